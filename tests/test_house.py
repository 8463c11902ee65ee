"""What holds the house together: the pins agree everywhere, and make and set-up do what they say."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = SpecifierSet(PYPROJECT["project"]["requires-python"])
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
# Where the pins must lead to exactly one version: the systems and interpreters that readers come with.
MACHINES = [
    {"sys_platform": system, "python_version": python[:4], "python_full_version": python, "platform_machine": processor}
    for system, processor in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11.2", "3.11.9", "3.12.3")
]
LARGEST = 5 * 2**20


def project_files() -> list[Path]:
    """Every file that is or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("This copy of the project is no git repository, so its files cannot be told from what was built.")
    return sorted(path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file())


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


# --- pins ---------------------------------------------------------------------------------------------------------


def test_lock_holds_only_exact_pins():
    loose = [str(pin) for pin in LOCK if [s.operator for s in pin.specifier] != ["=="] or pin.url]
    assert loose == []


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['sys_platform']}-{m['python_full_version']}")
def test_lock_pins_every_direct_dependency_once(machine):
    project = PYPROJECT["project"]
    direct = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for needed in map(Requirement, direct):
        pins = [
            pin
            for pin in LOCK
            if canonical(pin.name) == canonical(needed.name) and (not pin.marker or pin.marker.evaluate(machine))
        ]
        assert len(pins) == 1, f"{needed.name} has {len(pins)} pins in requirements.lock: run 'make lock'."
        version = next(iter(pins[0].specifier)).version
        assert needed.specifier.contains(version), f"{needed} is pinned to {version}: run 'make lock'."


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_conda_reads_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert pip == "pip" and packages == {"pip": ["-r requirements.lock", "-e ."]}
    assert PYTHONS.contains(python.removeprefix("python=") + ".9")


def test_binder_reads_the_lock():
    lock, project = (ROOT / "binder/requirements.txt").read_text().split("\n")[:2]
    assert (ROOT / "binder" / lock.removeprefix("-r ")).resolve() == ROOT / "requirements.lock"
    assert project == "-e ."
    assert PYTHONS.contains((ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-") + ".9")


# --- make and set-up ----------------------------------------------------------------------------------------------


def make(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run make as from a fresh shell: `make test` itself must not colour it."""
    outer = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "UV")}
    return subprocess.run(
        ["make", *words],
        cwd=cwd,
        env=outer | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("target", ["help", "setup", "book", "html", "test", "lab", "bench", "lock", "clean"])
def test_make_knows_target(target):
    done = make("-n", target)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^  {target} ", make().stdout, re.M), f"'make' alone does not list {target}."


def test_make_book_passes_its_choices_on():
    command = make("-n", "book", "PROFILE=smoke", "CHAPTERS=nullbus,malenia", "JOBS=3", "DATA=elsewhere").stdout
    assert "book/build.py book --profile smoke --chapters nullbus malenia --jobs 3 --data elsewhere" in command
    assert "--chapters" not in make("-n", "book").stdout


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert script.read_text().rstrip().endswith("exec make test </dev/null")
    assert os.access(script, os.X_OK) and os.access(ROOT / "setup.sh", os.X_OK)


def test_an_unknown_stage_is_named():
    done = subprocess.run(["bash", "tests/run.sh", "stlye"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "STAGES names 'stlye', and the stages are style, tests and notebooks.\n"


class Machine:
    """A folder with the set-up files and a PATH of stand-ins, each of which notes how it was called."""

    TOOLS = "awk bash cat chmod cp dirname env grep id make mkdir printf rm sh touch"

    def __init__(self, folder: Path):
        self.project, self.bin, self.log = folder / "project", folder / "bin", folder / "log"
        self.project.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "setup.sh", "requirements.lock", "pyproject.toml"):
            shutil.copy2(ROOT / name, self.project)
        for tool in self.TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def add(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{script}\n')
        path.chmod(0o755)

    def add_python(self, name: str, version: str, *, pip: int = 0) -> None:
        self.add(
            name,
            f"""case "$1 $2" in
                  "-c import sys"*) echo {version} ;;
                  "-m venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
                  "-m pip") exit {pip} ;;
                  *) exit 1 ;;
                esac""",
        )

    def add_shim(self, name: str) -> None:
        self.add(name, "exit 127")

    def make(self, *words: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        return make(*words, cwd=self.project, PATH=str(self.bin))

    def calls(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("interpreters", "chosen"),
    [
        ({"python3": "3.11.2"}, "python3"),
        ({"python3": "3.13.0", "python3.11": "3.11.7"}, "python3.11"),
        ({"python3": "3.12.1", "python3.12": "3.12.3", "python3.11": "3.11.7"}, "python3.12"),
        ({"python3.12": None, "python3.11": "3.11.7"}, "python3.11"),
        ({"python3": "3.10.13", "python": "3.12.0"}, "python"),
    ],
)
def test_setup_chooses_python(machine, interpreters, chosen):
    for name, version in interpreters.items():
        machine.add_python(name, version) if version else machine.add_shim(name)
    done = machine.make("setup", "UV=no")
    assert done.returncode == 0, done.stderr
    assert machine.calls(r"(\S+) -m venv") == [chosen]
    assert f"[setup] Creating .venv with Python {interpreters[chosen]} ({machine.bin / chosen})." in done.stdout


@pytest.mark.parametrize("version", ["3.10.13", "3.11.0", "3.12.9", "3.13.0"])
def test_setup_accepts_the_pythons_of_pyproject(machine, version):
    machine.add_python("python3", version)
    assert (machine.make("setup", "UV=no").returncode == 0) == PYTHONS.contains(version)


def test_no_fitting_python_is_one_sentence(machine):
    machine.add_python("python3", "3.10.13")
    done = machine.make("setup")
    said = [line for line in done.stderr.splitlines() if line.startswith("[setup]")]
    assert done.returncode and len(said) == 1 and said[0].startswith("[setup] No Python 3.11 or 3.12 was found on PATH")
    done = machine.make("setup", "PYTHON=python3")
    assert "[setup] PYTHON=python3 is Python 3.10.13, and Python 3.11 or 3.12 is needed" in done.stderr
    done = machine.make("setup", "PYTHON=python9")
    assert "[setup] PYTHON=python9 does not run, and Python 3.11 or 3.12 is needed" in done.stderr
    assert not (machine.project / ".venv").exists()


def test_second_setup_does_nothing_until_the_pins_change(machine):
    machine.add_python("python3", "3.11.7")
    assert machine.make("setup", "UV=no").returncode == 0
    assert len(machine.calls("-m pip install")) == 2
    assert machine.make("setup", "UV=no").returncode == 0
    assert machine.log.read_text() == ""
    later = (machine.project / ".venv/.ready").stat().st_mtime + 2
    os.utime(machine.project / "requirements.lock", (later, later))
    assert machine.make("setup", "UV=no").returncode == 0
    assert len(machine.calls("-m pip install")) == 2 and not machine.calls("-m venv")


def test_naming_another_python_sets_up_anew(machine):
    machine.add_python("python3.11", "3.11.7")
    machine.add_python("python3.12", "3.12.1")
    machine.make("setup", "UV=no", "PYTHON=python3.11")
    assert machine.make("setup", "UV=no", "PYTHON=python3.12").returncode == 0
    assert machine.calls(r"(\S+) -m venv") == ["python3.12"]
    machine.make("setup", "UV=no", "PYTHON=python3.12")
    assert machine.log.read_text() == ""


def test_interrupted_setup_starts_over(machine):
    machine.add_python("python3", "3.11.7", pip=1)
    done = machine.make("setup", "UV=no")
    assert done.returncode and "could not be installed" in done.stderr
    assert not (machine.project / ".venv/.ready").exists()
    machine.add_python("python3", "3.11.7")
    done = machine.make("setup", "UV=no")
    assert done.returncode == 0 and "The last set-up was interrupted" in done.stdout
    assert machine.calls("-m venv") and not (machine.project / ".venv.unfinished").exists()


@pytest.mark.parametrize(("exit_code", "pip_installs"), [(0, 0), (1, 2)])
def test_uv_is_used_where_it_works(machine, exit_code, pip_installs):
    machine.add_python("python3", "3.11.7")
    machine.add("uv", f"exit {exit_code}")
    done = machine.make("setup")
    assert done.returncode == 0 and machine.calls("uv pip install .*-r requirements.lock")
    assert len(machine.calls("-m pip install")) == pip_installs
    assert ("going on with pip" in done.stdout) == bool(exit_code)


def test_browser_is_found_or_missed_in_a_sentence(machine):
    machine.add_python("python3", "3.11.7")
    machine.make("setup", "UV=no")
    done = machine.make(".venv/.browser")
    assert done.returncode == 0 and "the page tests will be skipped: install chromium or Google Chrome" in done.stdout
    assert not (machine.project / ".venv/.browser").exists()
    machine.add("chromium", "exit 127")
    machine.add("google-chrome", "echo Google Chrome 150")
    assert machine.make(".venv/.browser").returncode == 0
    assert (machine.project / ".venv/.browser").read_text() == f"{machine.bin / 'google-chrome'}\n"


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_notebooks_store_no_outputs_and_take_a_profile(path):
    cells = json.loads(path.read_text())["cells"]
    run = [number for number, cell in enumerate(cells) if cell.get("outputs") or cell.get("execution_count")]
    assert run == [], f"{path.name} stores outputs in cells {run}: clear them before committing."
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and re.search(r"^profile\b.*=", "".join(tagged[0]["source"]), re.M)


def test_no_large_files():
    large = {str(path.relative_to(ROOT)): size for path in project_files() if (size := path.stat().st_size) > LARGEST}
    assert large == {}


def test_no_file_speaks_of_one_machine():
    # Written in pieces, so that this file does not find itself.
    folder = r"(?<![\w.:/*-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|op" + r"t|Us" + r"ers|usr/b" + r"in(?!/env\b))/\w"
    words = [r"py" + r"pi\.org", r"python" + r"hosted", r"np" + r"mjs\.org", r"\.lib" + r"rary\b", r"iss" + r"ues show"]
    forbidden = re.compile("|".join([folder, *words]))
    for path in project_files():
        if "_vendor" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = forbidden.search(text)
        assert not found, f"{path.relative_to(ROOT)} names {found[0]!r}, which exists on one machine only."


def test_every_yaml_file_parses():
    for path in project_files():
        if path.suffix in (".yml", ".yaml", ".cff") and "_vendor" not in path.parts:
            assert yaml.safe_load(path.read_text(encoding="utf-8")) is not None, f"{path.relative_to(ROOT)} is empty"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_pin_actions_and_call_real_targets(path):
    workflow = yaml.safe_load(path.read_text())
    assert True in workflow, "a workflow says when it runs: 'on:', which YAML reads as true"
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"actions/[\w-]+@v\d+", action), f"{action} is not pinned to a major version"
    for target in re.findall(r"^make (\w+)", "\n".join(step.get("run", "") for step in steps), re.M):
        assert make("-n", target).returncode == 0
    for job in workflow["jobs"].values():
        for python in job.get("strategy", {}).get("matrix", {}).get("python", []):
            assert PYTHONS.contains(f"{python}.9")


def test_citation_is_complete_and_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"].startswith("Prompt to Mask")
    assert citation["authors"] == [{"name": "The Prompt to Mask authors"}]
    assert citation["license"] == PYPROJECT["project"]["license"] == "Apache-2.0"
    assert Version(str(citation["version"])) == Version(PYPROJECT["project"]["version"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_the_pages_name_exists(page):
    text = (ROOT / page).read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", text, re.M)):
        assert make("-n", target).returncode == 0, f"{page} names 'make {target}'"
    for name in set(re.findall(r"\b((?:data_scripts|notebooks|book|lib|tests)/[a-z_/]+\.(?:py|ipynb|yml))\b", text)):
        assert (ROOT / name).exists(), f"{page} names {name}, which is not there"
