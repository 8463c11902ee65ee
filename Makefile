# Prompt to Mask. Every target sets up what it needs; `make` alone lists them.
PROFILE  ?= quick
CHAPTERS ?=
JOBS     ?= 2
DATA     ?= data

python := .venv/bin/python
ready  := .venv/.ready
comma  := ,

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup book html test lab bench lock clean

help: ## this list
	@echo "make TARGET [NAME=value]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(ready) ## a virtual environment in .venv with the pins of requirements.lock (PYTHON=python3.11, UV=no)
	@echo "Set up in .venv. Next: 'make book', then open _build/html/index.html; 'make test' checks everything."

book: $(ready) ## run the chapters and build the pages in _build/html (PROFILE=quick CHAPTERS=a,b JOBS=2 DATA=data)
	@$(python) book/build.py book --profile $(PROFILE) $(if $(CHAPTERS),--chapters $(subst $(comma), ,$(CHAPTERS))) --jobs $(JOBS) --data $(DATA)

html: $(ready) ## build the pages from the published results, running nothing
	@$(python) book/build.py html

test: $(ready) .venv/.browser ## everything that must hold: style, tests, pages, notebooks (STAGES="style tests notebooks")
	@bash tests/run.sh $(STAGES)

lab: $(ready) ## open the notebooks in JupyterLab
	@.venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

bench: $(ready) ## time the pairs that the design rests on, into bench/results.csv (BENCH=caption_bank,image_cache,...)
	@$(python) bench/run.py $(if $(BENCH),--only $(BENCH))

lock: $(ready) ## resolve requirements.lock anew after a change to pyproject.toml
	@bash setup.sh lock

clean: ## remove pages and caches; .venv, data and runs stay
	@rm -rf _build .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "Removed pages and caches. Kept: .venv, data, runs; remove them by hand for a fresh start."

$(ready): requirements.lock pyproject.toml
	@bash setup.sh environment

.venv/.browser: $(ready)
	@bash setup.sh browser

# Naming another interpreter than the one .venv was made for sets it up anew.
ifneq ($(PYTHON),)
ifneq ($(PYTHON),$(shell cat $(ready) 2>/dev/null))
.PHONY: $(ready)
endif
endif
