"""Execute the chapters with Papermill and render them, with the prose, through Jupyter Book.

python book/build.py book --profile quick --chapters nullbus --jobs 2     execute what changed, render all
python book/build.py html                                                 render what is published
python book/build.py publish --chapter nullbus --name nullbus-busi -p dataset busi
python book/build.py clean                                                remove _build
"""

import argparse
import ast
import difflib
import hashlib
import html
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import evidence
import yaml

from lib.printed import record_keys

PROFILES = ("smoke", "quick", "gpu", "paper")
PAPERS = ("nullbus", "uavls", "duplus", "medclip_samv2", "malenia")
ROOMS = (
    "In one minute",
    "The idea",
    "The model",
    "Fidelity",
    "Does it work?",
    "Claims",
    "Ablations and sweeps",
    "Audit",
    "Try it",
    "Beyond the paper",
    "Run it yourself",
)
CROSSINGS = ("entries", "missing", "losses", "uncertainty", "leakage", "cost", "ranking")
CROSSING_ROOMS = (
    "In one minute",
    "The question",
    "The ground",
    "What we found",
    "What it means for the papers",
    "What this cannot say",
    "Run it yourself",
)
# What the chapters run on by default.
PHANTOMS = ("bus", "cxr", "brain", "torso_ct", "torso_mr", "torso_pet", "prognosis")
PHANTOMS += ("lesions_ct", "lesions_mr", "lesions_varied")
HOW_MUCH = ("seeds", "steps", "test_cases", "repeats", "jobs")  # parameters that no title needs
RECORD_FILES = ("record.json", "cases.csv", "log.csv")
Notebook = dict[str, Any]


class BuildError(Exception):
    """A reason to stop, said in one sentence."""


@dataclass(frozen=True)
class Paths:
    """Where everything lies below one folder; tests give a folder of their own."""

    root: Path
    data: Path

    @classmethod
    def at(cls, root: Path, data: str | Path = "data") -> "Paths":
        return cls(root=root.resolve(), data=(root / data).resolve())

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def book(self) -> Path:
        return self.root / "book"

    @property
    def published(self) -> Path:
        return self.book / "published"

    @property
    def records(self) -> tuple[Path, Path]:
        return self.root / "runs/records", self.published / "records"

    @property
    def build(self) -> Path:
        return self.root / "_build"

    @property
    def source(self) -> Path:
        return self.build / "source"

    @property
    def html(self) -> Path:
        return self.build / "html"

    def executed(self, folder: str, name: str) -> Path:
        return self.build / "executed" / folder / f"{name}.ipynb"

    def shown(self, path: Path) -> str:
        """Return a path as the reader would type it."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def say(text: str) -> None:
    print(text, flush=True)


def read_notebook(path: Path) -> Notebook:
    """Read a notebook (format 4) as plain JSON, each cell's source as one string.

    Not with nbformat, whose import alone takes seconds: a call that finds nothing changed should not wait for it.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def write_notebook(notebook: Notebook, path: Path) -> None:
    """Write a notebook, complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def prose(notebook: Notebook) -> Iterator[dict[str, Any]]:
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def headings(cells: Iterable[dict[str, Any]], level: int) -> list[str]:
    """List the texts of the headings of one level."""
    pattern = rf"^#{{{level}}} +(.*?)\s*$"
    return [text for cell in cells for text in re.findall(pattern, cell["source"], flags=re.MULTILINE)]


# --- chapters and their parameters ------------------------------------------------------------------------------


def chapters(paths: Paths) -> list[str]:
    """List the chapters: the notebooks, by name."""
    return sorted(path.stem for path in paths.notebooks.glob("*.ipynb"))


def choose(paths: Paths, names: Sequence[str] | None) -> list[str]:
    """Return the chapters asked for (none asked: all); raises BuildError for an unknown one."""
    known = chapters(paths)
    for name in names or ():
        if name not in known:
            raise BuildError(f"unknown chapter {name!r}{_nearest(name, known)}; the chapters are: {', '.join(known)}.")
    return list(dict.fromkeys(names or known))


def declared_parameters(notebook: Notebook) -> list[str]:
    """List the names that the cell tagged `parameters` assigns."""
    sources = [cell["source"] for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    statements = ast.parse("\n".join(sources)).body
    assigned = [node.targets[0] for node in statements if isinstance(node, ast.Assign)]
    assigned += [node.target for node in statements if isinstance(node, ast.AnnAssign)]
    return [target.id for target in assigned if isinstance(target, ast.Name)]


def parameters_for(paths: Paths, name: str, profile: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to inject into a chapter; raises BuildError for a parameter that it does not have."""
    valid = declared_parameters(read_notebook(paths.notebooks / f"{name}.ipynb"))
    for parameter in given:
        if parameter not in valid:
            raise BuildError(
                f"chapter {name} has no parameter {parameter!r}{_nearest(parameter, valid)}; "
                f"valid are: {', '.join(valid)}."
            )
    ours = {"profile": profile, "data": paths.shown(paths.data)}
    return {key: value for key, value in ours.items() if key in valid} | dict(given)


def _nearest(given: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(given, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def missing_rooms(notebook: Path) -> list[str]:
    """List the rooms of the design that a chapter, of a paper or across papers, lacks or has out of order."""
    rooms = CROSSING_ROOMS if notebook.stem in CROSSINGS else ROOMS
    found = [re.sub(r"^\d+\.\s*", "", room) for room in headings(prose(read_notebook(notebook)), 2)]
    order = [room for room in found if room in rooms]
    absent = [room for room in rooms if room not in found]
    return absent or [room for room, expected in zip(order, rooms, strict=False) if room != expected]


# --- execution --------------------------------------------------------------------------------------------------


def chapter_key(paths: Paths, name: str, parameters: Mapping[str, Any]) -> str:
    """Name what an executed chapter depends on: its cells, parameters, the library, the pins, claims and data."""
    cells = read_notebook(paths.notebooks / f"{name}.ipynb")["cells"]
    digest = hashlib.sha256()
    digest.update(json.dumps([(cell["cell_type"], cell["source"], cell["metadata"]) for cell in cells]).encode())
    digest.update(json.dumps(parameters, sort_keys=True).encode())
    library = (path for path in (paths.root / "lib").rglob("*") if path.suffix in (".py", ".js", ".css"))
    texts = [paths.root / "requirements.lock", paths.book / "claims.yml", paths.book / "audit.yml"]
    for path in [*sorted(library), *(path for path in texts if path.exists())]:
        digest.update(f"{path.relative_to(paths.root)}\0".encode() + path.read_bytes())
    for card in sorted(paths.data.glob("*/card.json")):
        digest.update(f"{card.parent.name}\0".encode() + card.read_bytes())  # the card holds the fingerprint
    return digest.hexdigest()


def is_current(executed: Path, key: str) -> bool:
    """Tell whether an executed chapter exists and was made from this key."""
    if not executed.exists():
        return False
    return json.loads(executed.read_bytes())["metadata"].get("prompt_to_mask", {}).get("key") == key


def make_phantoms(paths: Paths) -> None:
    """Make the default datasets of the chapters where they are missing."""
    for kind in PHANTOMS:
        folder = paths.data / f"phantom_{kind}"
        if (folder / "card.json").exists():
            continue
        say(f"data      making the phantoms in {paths.shown(folder)}")
        command = [sys.executable, "data_scripts/phantoms.py", kind, "--out", str(folder)]
        if subprocess.run(command, cwd=paths.root).returncode:
            raise BuildError(f"the phantoms could not be made in {paths.shown(folder)}: see the message above.")


def execute(paths: Paths, names: Sequence[str], profile: str, given: Mapping[str, Any], jobs: int) -> dict[str, str]:
    """Execute the chapters that changed, in parallel; returns the failures as chapter -> sentence."""
    parameters = {name: parameters_for(paths, name, profile, given) for name in names}
    keys = {name: chapter_key(paths, name, parameters[name]) for name in names}
    todo = [name for name in names if not is_current(paths.executed(profile, name), keys[name])]
    for name in names:
        if name not in todo:
            say(f"chapter   {name} is unchanged: not executed again")
    if not todo:
        return {}
    jobs = min(jobs, len(todo))
    say(f"chapter   executing {', '.join(todo)} (profile {profile}, {jobs} at a time)")
    if jobs > 1:  # where chapters share the cores, workers of their own would only cost their imports
        for name in todo:
            if "jobs" in declared_parameters(read_notebook(paths.notebooks / f"{name}.ipynb")):
                parameters[name].setdefault("jobs", 1)
    failures = {}
    with _pool(jobs) as pool:
        futures = {
            pool.submit(execute_one, paths, name, profile, parameters[name], keys[name], jobs): name for name in todo
        }
        for future in as_completed(futures):
            try:
                future.result()
            except Exception as error:  # one chapter's trouble must not stop the others
                failures[futures[future]] = str(error)
                say(f"FAILED    {error}")
    return failures


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Spawned processes, so that no kernel inherits a lock, a working folder or a setting."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def execute_one(paths: Paths, name: str, folder: str, parameters: Mapping[str, Any], key: str, jobs: int = 1) -> Path:
    """Execute one chapter into `_build/executed/<folder>`, where it appears only when it is complete."""
    _skip_slow_import()
    import papermill
    from papermill.engines import papermill_engines

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    os.environ["PAPERMILL"] = "1"  # no progress bars in the pages
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of the debugger in every kernel
    papermill_engines.register("announcing", _announcing_engine(name))
    target = paths.executed(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{name}.ipynb")
    started = time.monotonic()
    try:
        papermill.execute_notebook(
            str(paths.notebooks / f"{name}.ipynb"),
            str(part),
            parameters=dict(parameters),
            engine_name="announcing",
            kernel_name="python3",
            language="python",
            cwd=str(paths.root),
            progress_bar=False,
            request_save_on_cell_execute=False,  # saving after every cell costs more than many a cell
            extra_arguments=["--IPKernelApp.log_level=40"],  # for nbclient; not to warn of the local socket
        )
        notebook = read_notebook(part)
        notebook["metadata"]["prompt_to_mask"] = {"chapter": name, "key": key, "parameters": dict(parameters)}
        for path in ("input_path", "output_path"):
            notebook["metadata"]["papermill"][path] = f"{name}.ipynb"  # no reader has our folders
        write_notebook(notebook, target)
    except Exception as error:
        raise BuildError(_failure(paths, name, folder, part, error)) from None
    finally:
        part.unlink(missing_ok=True)
    say(f"chapter   {name} done in {time.monotonic() - started:.0f} s")
    return target


def _skip_slow_import() -> None:
    """Hide the URI checker that jsonschema would load with every nbformat: it builds a grammar for seconds."""
    sys.modules["rfc3987_syntax"] = None


def _announcing_engine(name: str) -> type:
    from papermill.engines import NBClientEngine

    class Announcing(NBClientEngine):
        """Papermill's engine, saying on the terminal which room it enters: its bars do not survive parallel jobs."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *args: Any, **options: Any) -> Any:
            start, begun = nb_man.cell_start, time.monotonic()

            def announce(cell: dict[str, Any], index: int | None = None, **more: Any) -> None:
                for room in headings([cell], 2) if cell["cell_type"] == "markdown" else ():
                    say(f"          {name} {time.monotonic() - begun:5.0f} s  {room}")
                start(cell, index, **more)

            nb_man.cell_start = announce
            return super().execute_managed_notebook(nb_man, *args, **options)

    return Announcing


def _failure(paths: Paths, name: str, folder: str, part: Path, error: Exception) -> str:
    """Say where a chapter failed, and leave what ran for reading."""
    if not part.exists():
        return f"notebooks/{name}.ipynb could not be executed: {type(error).__name__}: {error}"
    left = paths.build / "failed" / folder / f"{name}.ipynb"
    left.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, left)
    where, room, number = "", "", 0
    for cell in read_notebook(left)["cells"]:
        if cell["cell_type"] == "markdown":
            room = (headings([cell], 2) or [room])[-1]
        number += cell["cell_type"] == "code"
        if any(output["output_type"] == "error" for output in cell.get("outputs", ())):
            where = f", code cell {number}" + (f" (in '{room}')" if room else "")
            break
    reason = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else f"{type(error).__name__}: {error}"
    return f"notebooks/{name}.ipynb{where}: {reason.strip().splitlines()[0]} [what ran: {paths.shown(left)}]"


# --- publishing -------------------------------------------------------------------------------------------------


def publish(paths: Paths, chapter: str, name: str, profile: str, given: Mapping[str, Any], title: str | None) -> None:
    """Execute a chapter and keep the result, with the run records that it shows, in book/published."""
    choose(paths, [chapter])
    if name != chapter and not name.startswith(f"{chapter}-"):
        raise BuildError(f"--name {name} must be {chapter}, or begin with {chapter}-, to stand below its chapter.")
    parameters = parameters_for(paths, chapter, profile, given)
    key = chapter_key(paths, chapter, parameters)
    with _pool(1) as pool:
        executed = pool.submit(execute_one, paths, chapter, f"published/{name}", parameters, key).result()
    notebook = read_notebook(executed)
    for index, cell in enumerate(notebook["cells"]):
        if str(paths.root) in json.dumps(cell):
            raise BuildError(
                f"cell {index} of {paths.shown(executed)} shows the path of this machine: print it relative to the "
                "repository, then publish again."
            )
    if name != chapter:
        words = ", ".join(f"{key} {value}" for key, value in given.items() if key not in HOW_MUCH)
        _retitle(notebook, f" — {title or words or name[len(chapter) + 1 :]}")
    for key in record_keys(notebook, "weights"):
        for suffix in (".safetensors", ".json"):
            source, target = (folder.parent / "weights" / f"{key}{suffix}" for folder in paths.records)
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    keys = record_keys(notebook, "records")
    for key in keys:
        source, target = paths.records[0] / key, paths.records[1] / key
        absent = [file for file in RECORD_FILES if not (source / file).exists() and not (target / file).exists()]
        if absent:
            raise BuildError(
                f"run record {paths.shown(source)} has no {absent[0]}: run the chapter again, then publish."
            )
        if source.exists():
            target.mkdir(parents=True, exist_ok=True)
            for file in RECORD_FILES:
                shutil.copy(source / file, target / file)
    paths.published.mkdir(parents=True, exist_ok=True)
    write_notebook(notebook, paths.published / f"{name}.ipynb")
    say(f"published book/published/{name}.ipynb with {len(keys)} run records")


def _retitle(notebook: Notebook, suffix: str) -> None:
    cell = next(cell for cell in prose(notebook) if headings([cell], 1))
    cell["source"] = re.sub(r"^(# .*)$", rf"\g<1>{suffix}", cell["source"], count=1, flags=re.MULTILINE)


# --- the tree that Jupyter Book reads -----------------------------------------------------------------------------


def pages_of(paths: Paths, profile: str | None = None, given: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Choose each chapter's page: executed and current where a profile is given, else published, else none."""
    pages = {path.stem: path for path in sorted(paths.published.glob("*.ipynb"))}
    for name in chapters(paths) if profile else ():
        executed = paths.executed(profile, name)
        if executed.exists() and is_current(
            executed, chapter_key(paths, name, parameters_for(paths, name, profile, given or {}))
        ):
            pages[name] = executed
    return pages


def stage(paths: Paths, pages: Mapping[str, Path]) -> None:
    """Write the tree that Jupyter Book renders: prose, chapters, what was run, table of contents, scripts."""
    shutil.rmtree(paths.source, ignore_errors=True)
    paths.source.mkdir(parents=True)
    for pattern in ("*.md", "*.bib"):
        for path in paths.book.glob(pattern):
            shutil.copy(path, paths.source)
    for folder in ("_vendor", "_assets"):
        shutil.copytree(paths.book / folder, paths.source / folder)
    shutil.copy(anywidget_bundle(), paths.source / "_vendor/widgets/anywidget.js")
    # Chapters keep their path of the repository, because the launch buttons are made from it.
    folder = paths.source / "notebooks"
    folder.mkdir()
    notebooks = {}
    for name, path in pages.items():
        notebooks[name] = read_notebook(path)
        if name not in chapters(paths):
            _relabel(notebooks[name], name)
        write_notebook(notebooks[name], folder / f"{name}.ipynb")
    for name in chapters(paths):
        if name not in pages:
            (folder / f"{name}.md").write_text(_not_run(paths, name), encoding="utf-8")
    toc = contents(paths, list(pages), below={"ledger": write_evidence(paths, pages)})
    (paths.source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    (paths.source / "what_was_run.md").write_text(what_was_run(paths, notebooks), encoding="utf-8")


def write_evidence(paths: Paths, pages: Mapping[str, Path]) -> list[str]:
    """Write the pages of the evidence; returns those that go below the ledger.

    Raises BuildError where a published page prints what its records do not say.
    """
    given = evidence.gather(
        paths.book,
        pages,
        paths.records,
        paths.data,
        titles={name: _title(paths, name) for name in chapters(paths)},
        datasets=_scripted(paths),
        cache=paths.build / "evidence.json",
    )
    if wrong := given.disagreements:
        raise BuildError(
            f"a published page and its records disagree: {wrong[0]} ({len(wrong) - 1} more; "
            "`python -m lib.ledger verify` lists them): publish the page again."
        )
    return evidence.write(paths.source, given)


def _scripted(paths: Paths) -> list[str]:
    """The datasets that have a script of their own; what they share has no command line."""
    scripts = sorted((paths.root / "data_scripts").glob("*.py"))
    return [path.stem for path in scripts if "\ndef main(" in path.read_text("utf-8") and path.stem != "phantoms"]


def contents(paths: Paths, pages: Sequence[str], below: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Return book/_toc.yml with the published variants below their chapters, and what is generated below a page."""
    toc = yaml.safe_load((paths.book / "_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    listed = [Path(entry["file"]).name for entry in entries if entry["file"].startswith("notebooks/")]
    for name in chapters(paths):
        if name not in listed:
            raise BuildError(f"notebooks/{name}.ipynb is not in book/_toc.yml: add 'file: notebooks/{name}' to a part.")
    for name in listed:
        if name not in chapters(paths):
            raise BuildError(f"book/_toc.yml lists notebooks/{name}, and there is no notebooks/{name}.ipynb.")
    for entry in entries:
        chapter = Path(entry["file"]).name
        variants = [page for page in pages if page.startswith(f"{chapter}-") and page not in listed]
        if entry["file"].startswith("notebooks/") and variants:
            entry["sections"] = [{"file": f"notebooks/{page}"} for page in variants]
        if generated := (below or {}).get(entry["file"]):
            entry["sections"] = [{"file": page} for page in generated]
    return toc


def _title(paths: Paths, name: str) -> str:
    return (headings(prose(read_notebook(paths.notebooks / f"{name}.ipynb")), 1) or [name])[0]


def _not_run(paths: Paths, name: str) -> str:
    title = _title(paths, name)
    return f"# {title}\n\nThis chapter has not been run yet. To see it: `make book CHAPTERS={name}`.\n"


def _relabel(notebook: Notebook, page: str) -> None:
    """Make the explicit labels of a chapter's second copy its own: Sphinx wants them unique in the book."""
    pattern = r"^\(([\w:.-]+)\)=|\$\$ *\(([\w:.-]+)\)|^:(?:label|name): +([\w:.-]+)"
    found = [label for cell in prose(notebook) for label in re.findall(pattern, cell["source"], flags=re.MULTILINE)]
    for label in {"".join(groups) for groups in found}:
        use = rf"(?<=[(`<#]){re.escape(label)}(?=[)`>])|(?<=: ){re.escape(label)}$"
        for cell in prose(notebook):
            cell["source"] = re.sub(use, f"{label}-{page}", cell["source"], flags=re.MULTILINE)


def anywidget_bundle() -> Path:
    """Find the front end of the installed anywidget."""
    for file in metadata.files("anywidget") or ():
        if str(file).endswith("nbextensions/anywidget/index.js"):
            return Path(str(file.locate())).resolve()
    raise BuildError("the installed anywidget has no nbextensions/anywidget/index.js: run make setup.")


def what_was_run(paths: Paths, notebooks: Mapping[str, Notebook]) -> str:
    """Return the page that lists every run record behind the book."""
    used: dict[str, list[str]] = {}
    for page, notebook in notebooks.items():
        for key in record_keys(notebook, "records"):
            used.setdefault(key, []).append(page)
    for path in paths.records[1].glob("*/record.json"):
        used.setdefault(path.parent.name, [])
    rows = []
    for key, pages in used.items():
        folder = next((folder / key for folder in paths.records if (folder / key / "record.json").exists()), None)
        if folder:
            rows.append((json.loads((folder / "record.json").read_text(encoding="utf-8")), pages))
    lines = [
        "# What was run",
        "",
        "Every number in the chapters comes from one of these runs. The key names the code, the data, the settings and",
        "the seed: the same key gives the same numbers on the same kind of device. A commit with a + had changes that",
        "were not committed yet.",
        "",
    ]
    if not rows:
        return "\n".join([*lines, "No run records are part of this build.", ""])
    seconds = sum(record["meta"]["seconds"] for record, _ in rows)
    spent = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
    lines += [f"{len(rows)} runs, {spent} in all.", "", '<div class="runs"><table>']
    heads = ("arm", "datasets", "level", "seed", "device", "seconds", "commit", "key", "shown in")
    lines.append("<thead><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>")
    for record, pages in sorted(rows, key=lambda row: (row[0]["arm"], row[0]["experiment"]["seed"])):
        cells = [*_run_cells(record), ", ".join(pages)]
        row = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        lines.append(f'<tr id="run-{record["key"][:12]}">{row}</tr>')
    return "\n".join([*lines, "</tbody></table></div>", ""])


def _run_cells(record: Mapping[str, Any]) -> list[Any]:
    experiment, meta = record["experiment"], record["meta"]
    datasets = dict.fromkeys([*experiment["train"], *(test["dataset"] for test in experiment["tests"])])
    levels = sorted({meta["datasets"][name]["level"] for name in datasets})
    return [
        record["arm"],
        ", ".join(datasets),
        ", ".join(levels),
        experiment["seed"],
        meta["device"],
        f"{meta['seconds']:.0f}",
        meta["commit"][:7] + "+" * meta["dirty"],
        record["key"][:12],
    ]


# --- rendering ----------------------------------------------------------------------------------------------------


def render(paths: Paths, pages: Mapping[str, Path]) -> None:
    """Render the pages into _build/html, which is replaced only by a complete book; skipped when nothing changed."""
    stage(paths, pages)
    key = _tree_key(paths)
    stamp = paths.html / ".key"
    if stamp.exists() and stamp.read_text() == key:
        say("pages     unchanged: not rendered again")
        return
    say(f"pages     rendering {len(pages)} executed chapters and the prose")
    work = paths.build / "rendering"
    shutil.rmtree(work, ignore_errors=True)
    call = "import sys; sys.modules['rfc3987_syntax'] = None; "  # see _skip_slow_import
    call += "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", call, "build", str(paths.source)]
    command += ["--config", str(paths.root / "_config.yml"), "--path-output", str(work), "-W", "-n", "--keep-going"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())
    log = paths.build / "render.log"
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        for line in re.findall(r"^.*(?:WARNING|ERROR).*$", done.stdout, flags=re.MULTILINE):
            say(f"          {line.replace(str(paths.source), '')}")
        raise BuildError(f"the pages could not be rendered: see the warnings above, and all of {paths.shown(log)}.")
    made = work / "_build/html"
    _launch_the_chapter(paths, made, pages)
    if outside := network_needs(made):
        raise BuildError(f"the pages would need a network: {outside[0]} (and {len(outside) - 1} more).")
    (made / ".key").write_text(key)
    old = paths.build / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if paths.html.exists():
        paths.html.rename(old)
    made.rename(paths.html)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}


def _tree_key(paths: Paths) -> str:
    digest = hashlib.sha256()
    files = [path for path in paths.source.rglob("*") if path.is_file()]
    for path in [Path(__file__), paths.root / "_config.yml", *sorted(files)]:
        digest.update(f"{path.name if path.parent != paths.source else path.relative_to(paths.source)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _launch_the_chapter(paths: Paths, pages_folder: Path, pages: Mapping[str, Path]) -> None:
    """Let the launch buttons of a published variant open its chapter, the notebook that can be run."""
    for name in set(pages) - set(chapters(paths)):
        page = pages_folder / f"notebooks/{name}.html"
        chapter = max((known for known in chapters(paths) if name.startswith(known)), key=len)
        text = page.read_text(encoding="utf-8")
        text = re.sub(rf"(https://[^\"]*)notebooks/{re.escape(name)}\.ipynb", rf"\1notebooks/{chapter}.ipynb", text)
        page.write_text(text, encoding="utf-8")


def network_needs(folder: Path) -> list[str]:
    """List what the pages would load from a network: scripts, styles, fonts, images and frames, not plain links."""
    found = []
    for page in sorted(folder.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source|video|audio|embed)\b[^>]*>", text):
            if re.search(r"""\b(?:src|href)=["']?(?:https?:)?//""", tag) and "canonical" not in tag:
                found.append(f"{page.relative_to(folder)}: {tag}")
    for sheet in sorted(folder.rglob("*.css")):
        for use in re.findall(r"""(?:@import|url\()\s*["']?(?:https?:)?//[^"')]*""", sheet.read_text(encoding="utf-8")):
            found.append(f"{sheet.relative_to(folder)}: {use}")
    return found


# --- the command line -----------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    paths = Paths.at(root or Path(__file__).resolve().parents[1], options.data)
    started = time.monotonic()
    try:
        failures = _run(paths, options)
    except BuildError as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("book: interrupted; what was complete is kept, and the next call goes on from there.", file=sys.stderr)
        return 130
    if options.command != "clean":
        say(f"done in {time.monotonic() - started:.1f} s: open {paths.shown(paths.html)}/index.html")
    for failure in failures:
        print(f"book: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _run(paths: Paths, options: argparse.Namespace) -> list[str]:
    given = {name: yaml.safe_load(value) for name, value in options.parameters}
    if options.command == "clean":
        shutil.rmtree(paths.build, ignore_errors=True)
        say(f"removed {paths.shown(paths.build)}")
        return []
    if options.command == "html":
        render(paths, pages_of(paths))
        return []
    if options.command == "publish":
        make_phantoms(paths)
        publish(paths, options.chapter, options.name, options.profile, given, options.title)
        render(paths, pages_of(paths))
        return []
    names = choose(paths, options.chapters)
    for name in names:  # a mistyped parameter stops here, before minutes of data and training
        parameters_for(paths, name, options.profile, given)
    make_phantoms(paths)
    failures = execute(paths, names, options.profile, given, options.jobs)
    render(paths, pages_of(paths, options.profile, given))
    return [f"{failure} (the other chapters were built)" for failure in failures.values()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(parameters=[], data="data")
    commands = parser.add_subparsers(dest="command", required=True)
    book = commands.add_parser("book", help="execute the chapters that changed, and render the pages")
    book.add_argument("--chapters", nargs="*", help="names of chapters (default: all)")
    book.add_argument("--jobs", type=int, default=2, help="chapters executed at the same time")
    commands.add_parser("html", help="render what is published, executing nothing")
    commands.add_parser("clean", help="remove _build")
    publish = commands.add_parser("publish", help="execute a chapter and keep it, with its run records")
    publish.add_argument("--chapter", required=True)
    publish.add_argument("--name", required=True, help="name of the page: the chapter's, or CHAPTER-something")
    publish.add_argument("--title", help="what follows the chapter's title (default: the parameters)")
    for command in (book, publish):
        command.add_argument("--profile", choices=PROFILES, default="quick")
        command.add_argument("--data", default="data", help="folder of the datasets")
        command.add_argument(
            "-p",
            "--parameters",
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help="a parameter of the chapters, as for papermill",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
