import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book"))  # book/ is a folder of scripts, not a package

import build  # noqa: E402
from build import BuildError, Paths  # noqa: E402

TINY = [
    new_markdown_cell("# Tiny"),
    new_code_cell('profile = "quick"\nseeds: int = 2', metadata={"tags": ["parameters"]}),
    new_markdown_cell("## 1. In one minute"),
    new_code_cell("print(profile, seeds)"),
]


def write_notebook(paths, name, cells):
    paths.notebooks.mkdir(exist_ok=True)
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    (paths.notebooks / f"{name}.ipynb").write_text(json.dumps(notebook))


def write_book(folder, chapters=None):
    """Write a repository with the real prose, scripts and settings, and chapters of a few cells."""
    paths = Paths.at(folder)
    skip = shutil.ignore_patterns("published", "__pycache__", "*.yml")
    shutil.copytree(ROOT / "book", paths.book, ignore=skip)
    shutil.copy(ROOT / "_config.yml", folder)
    for name in (f"phantom_{kind}" for kind in build.PHANTOMS):
        (paths.data / name).mkdir(parents=True)
        (paths.data / name / "card.json").write_text('{"fingerprint": "one"}')
    chapters = chapters or {"nullbus": TINY}
    for name in re.findall(r"\(notebooks/(\w+)\)", index := (paths.book / "index.md").read_text()):
        if name not in chapters:  # the real index opens every real chapter
            index = index.replace(f"(notebooks/{name})", "(notebooks/nullbus)")
            (paths.book / "index.md").write_text(index)
    parts = []
    for name, cells in chapters.items():
        write_notebook(paths, name, cells)
        parts.append({"caption": name, "chapters": [{"file": f"notebooks/{name}"}]})
    prose = ("method", "ledger", "audit", "stale", "not_run", "what_was_run", "references")
    pages = {"caption": "Prose", "chapters": [{"file": page} for page in prose]}
    (paths.book / "_toc.yml").write_text(
        yaml.safe_dump({"format": "jb-book", "root": "index", "parts": [*parts, pages]})
    )
    return paths


def write_record(folder, key, **experiment):
    (folder / key).mkdir(parents=True)
    meta = {
        "seconds": 3.4,
        "device": "cpu",
        "commit": "1234567890",
        "dirty": False,
        "datasets": {"phantom_bus": {"level": "P"}},
    }
    settings = {"train": ["phantom_bus"], "tests": [{"dataset": "phantom_bus"}], "seed": 1} | experiment
    record = {"key": key, "arm": "mixed <null>", "experiment": settings, "meta": meta}
    (folder / key / "record.json").write_text(json.dumps(record))
    for table in ("cases.csv", "log.csv"):
        (folder / key / table).write_text("a\n1\n")


def showing(*keys, **more):
    """A code cell that displays what chapter.provenance or chapter.weights displays."""
    used = {"records": list(keys)} | more
    return new_code_cell(
        "from IPython.display import display\n"
        f"display({{'text/html': 'runs'}}, raw=True, metadata={{'prompt_to_mask': {used}}})"
    )


@pytest.fixture
def paths(tmp_path):
    return write_book(tmp_path)


# --- chapters and parameters --------------------------------------------------------------------------------------


def test_an_unknown_chapter_is_named_with_the_valid_ones(paths, capsys):
    assert build.main(["book", "--chapters", "nulbus"], root=paths.root) == 1
    said = capsys.readouterr().err
    assert said == "book: unknown chapter 'nulbus' (did you mean 'nullbus'?); the chapters are: nullbus.\n"
    assert build.choose(paths, None) == build.choose(paths, []) == ["nullbus"]


def test_an_unknown_parameter_stops_before_anything_runs(paths, capsys):
    shutil.rmtree(paths.data)
    assert build.main(["book", "-p", "sedes", "3"], root=paths.root) == 1
    said = capsys.readouterr().err
    assert (
        said == "book: chapter nullbus has no parameter 'sedes' (did you mean 'seeds'?); valid are: profile, seeds.\n"
    )
    assert not paths.build.exists() and not paths.data.exists()


def test_only_declared_parameters_are_injected(paths):
    assert build.parameters_for(paths, "nullbus", "smoke", {"seeds": 5}) == {"profile": "smoke", "seeds": 5}
    write_notebook(paths, "nullbus", [new_code_cell('data = "data"', metadata={"tags": ["parameters"]})])
    assert build.parameters_for(paths, "nullbus", "smoke", {}) == {"data": "data"}


def test_the_data_folder_is_passed_as_the_reader_would_type_it(paths):
    write_notebook(paths, "nullbus", [new_code_cell('data = "data"', metadata={"tags": ["parameters"]})])
    for given, shown in {"sets": "sets", "/elsewhere/sets": "/elsewhere/sets"}.items():
        assert build.parameters_for(Paths.at(paths.root, given), "nullbus", "quick", {}) == {"data": shown}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_every_chapter_has_the_rooms_of_the_design_in_order(name):
    assert name in (*build.PAPERS, *build.CROSSINGS)
    assert build.missing_rooms(ROOT / f"notebooks/{name}.ipynb") == []


def test_rooms_that_are_absent_or_swapped_are_found(paths):
    rooms = [new_markdown_cell(f"## {n}. {room}\n\ntext") for n, room in enumerate(build.ROOMS, 1)]
    notebook = paths.notebooks / "nullbus.ipynb"
    for cells, wrong in (
        (rooms, []),
        (rooms[1:], ["In one minute"]),
        ([rooms[1], rooms[0], *rooms[2:]], list(build.ROOMS[1::-1])),
    ):
        write_notebook(paths, "nullbus", cells)
        assert build.missing_rooms(notebook) == wrong


# --- execution ------------------------------------------------------------------------------------------------------


def test_the_key_follows_what_can_change_a_chapter(paths):
    def key(**parameters):
        return build.chapter_key(paths, "nullbus", {"profile": "quick"} | parameters)

    seen = [key(), key(seeds=3)]
    (paths.root / "lib").mkdir()
    for file, text in {
        "lib/text.py": "a = 1",
        "lib/explorer.js": "1",
        "requirements.lock": "torch==2.11.0",
        "book/claims.yml": "[]",
        "data/phantom_bus/card.json": '{"fingerprint": "two"}',
    }.items():
        (paths.root / file).write_text(text)
        seen.append(key())
    write_notebook(paths, "nullbus", [*TINY, new_markdown_cell("more")])
    seen.append(key())
    assert len(set(seen)) == len(seen)
    unrelated = {**TINY[3], "outputs": [], "execution_count": 7}
    write_notebook(paths, "nullbus", [*TINY[:3], unrelated, new_markdown_cell("more")])
    (paths.root / "lib/notes.txt").write_text("not read by a chapter")
    assert key() == seen[-1]


def test_chapters_run_in_parallel_and_one_failure_spares_the_others(tmp_path, capfd):
    broken = [*TINY, new_markdown_cell("## 2. The idea"), new_code_cell("raise OSError('no images in data/busi')\n")]
    own = new_code_cell('profile = "quick"\nseeds: int = 2\njobs: int = 0', metadata={"tags": ["parameters"]})
    working = [TINY[0], own, TINY[2], new_code_cell("print(profile, seeds, f'jobs {jobs}')")]
    paths = write_book(tmp_path, {"nullbus": working, "malenia": broken})
    failures = build.execute(paths, ["nullbus", "malenia"], "smoke", {"seeds": 4}, jobs=2)
    assert list(failures) == ["malenia"]
    assert failures["malenia"].startswith(
        "notebooks/malenia.ipynb, code cell 4 (in '2. The idea'): OSError: no images in data/busi"
    )
    left = re.search(r"\[what ran: (.*)\]", failures["malenia"])[1]
    assert "smoke 4" in (tmp_path / left).read_text()
    assert [path.name for path in (paths.build / "executed/smoke").iterdir()] == ["nullbus.ipynb"]
    executed = paths.executed("smoke", "nullbus").read_text()
    assert "smoke 4 jobs 1" in executed and str(tmp_path) not in executed
    said = capfd.readouterr().out
    assert "1. In one minute" in said and "nullbus done in" in said
    assert build.execute(paths, ["nullbus"], "smoke", {"seeds": 4}, jobs=2) == {}
    assert "nullbus is unchanged: not executed again" in capfd.readouterr().out


def test_a_killed_build_leaves_no_page(tmp_path):
    slow = [*TINY, new_code_cell("from pathlib import Path\nPath('here').touch()\nimport time; time.sleep(600)")]
    paths = write_book(tmp_path, {"nullbus": slow})
    call = f"import sys; sys.path.insert(0, {str(ROOT / 'book')!r}); import build; from pathlib import Path; "
    call += f"build.execute_one(build.Paths.at(Path({str(tmp_path)!r})), 'nullbus', 'quick', {{}}, 'key')"
    building = subprocess.Popen([sys.executable, "-c", call], start_new_session=True)
    for _ in range(1200):
        if (tmp_path / "here").exists() or building.poll() is not None:
            break
        time.sleep(0.1)
    assert (tmp_path / "here").exists()
    building.kill()  # no handler runs, and a shell in the background may have silenced gentler signals
    assert building.wait(timeout=60) != 0
    assert not paths.executed("quick", "nullbus").exists()
    assert build.pages_of(paths, "quick") == {}


def test_phantoms_are_made_once_where_they_are_missing(paths, capfd):
    shutil.rmtree(paths.data)
    script = paths.root / "data_scripts/phantoms.py"
    script.parent.mkdir()
    script.write_text("import sys; sys.exit('no room for images')")
    with pytest.raises(BuildError, match="phantoms could not be made in data/phantom_bus"):
        build.make_phantoms(paths)
    script.write_text(
        "import pathlib, sys\n"
        f"assert sys.argv[1] in {build.PHANTOMS} and sys.argv[2] == '--out'\n"
        "folder = pathlib.Path(sys.argv[3]); folder.mkdir(parents=True); (folder / 'card.json').write_text('{}')\n"
    )
    build.make_phantoms(paths)
    assert {path.name for path in paths.data.iterdir()} == {f"phantom_{kind}" for kind in build.PHANTOMS}
    script.unlink()
    build.make_phantoms(paths)


# --- publishing -----------------------------------------------------------------------------------------------------


def test_publish_keeps_the_page_and_the_records_that_it_shows(paths, capsys):
    write_notebook(paths, "nullbus", [*TINY, showing("k1", "k2")])
    write_record(paths.records[0], "k1")
    call = (paths, "nullbus", "nullbus-busi", "quick", {"seeds": 7}, None)
    with pytest.raises(BuildError, match="run record runs/records/k2 has no record.json"):
        build.publish(*call)
    assert not list(paths.published.glob("*.ipynb"))
    write_record(paths.records[0], "k2", seed=2)
    build.publish(*call)
    page = build.read_notebook(paths.published / "nullbus-busi.ipynb")
    assert page["cells"][0]["source"] == "# Tiny — busi"
    assert sorted(path.name for path in paths.records[1].iterdir()) == ["k1", "k2"]
    assert {path.name for path in (paths.records[1] / "k1").iterdir()} == set(build.RECORD_FILES)
    build.stage(paths, build.pages_of(paths))
    shown = (paths.source / "what_was_run.md").read_text()
    assert shown.count("<tr id=") == 2 and '<tr id="run-k2"><td>mixed &lt;null&gt;</td><td>phantom_bus</td>' in shown
    assert "2 runs, 0 minutes in all" in shown and "<td>nullbus-busi</td>" in shown
    assert "has not been run yet" in (paths.source / "notebooks/nullbus.md").read_text()


def test_publish_keeps_the_weights_that_the_explorer_uses(paths):
    write_notebook(paths, "nullbus", [*TINY, showing("k1", weights=["f1"])])
    write_record(paths.records[0], "k1")
    for name in ("f1.safetensors", "f1.json", "f2.safetensors"):
        path = paths.root / "runs/weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    build.publish(paths, "nullbus", "nullbus", "quick", {}, None)
    kept = {path.name: path.read_text() for path in (paths.published / "weights").iterdir()}
    assert kept == {name: name for name in ("f1.safetensors", "f1.json")}


def test_the_launch_buttons_of_a_variant_open_its_chapter(paths):
    page = paths.html / "notebooks/nullbus-busi.html"
    page.parent.mkdir(parents=True)
    links = (
        '<a href="https://colab.org/blob/main/notebooks/{0}.ipynb"><a href="../_sources/notebooks/nullbus-busi.ipynb">'
    )
    page.write_text(links.format("nullbus-busi"))
    build._launch_the_chapter(paths, paths.html, {"nullbus": page, "nullbus-busi": page})
    assert page.read_text() == links.format("nullbus")


def test_publish_refuses_a_page_that_shows_this_machine(paths, capsys):
    write_notebook(paths, "nullbus", [*TINY, new_code_cell("import os; print(os.getcwd())")])
    options = ["--chapter", "nullbus", "--name", "nullbus"]
    assert build.main(["publish", *options], root=paths.root) == 1
    assert "cell 5 of _build/executed/published/nullbus/nullbus.ipynb shows the path" in capsys.readouterr().err
    assert not list(paths.published.glob("*.ipynb"))


def test_publish_wants_a_name_below_its_chapter(paths):
    with pytest.raises(BuildError, match="--name busi must be nullbus, or begin with nullbus-"):
        build.publish(paths, "nullbus", "busi", "quick", {}, None)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_variants_stand_below_their_chapter(paths):
    toc = build.contents(paths, ["nullbus", "nullbus-busi"])
    assert toc["parts"][0]["chapters"] == [
        {"file": "notebooks/nullbus", "sections": [{"file": "notebooks/nullbus-busi"}]}
    ]


def test_the_table_of_contents_and_the_notebooks_agree(paths):
    write_notebook(paths, "malenia", TINY)
    with pytest.raises(BuildError, match="notebooks/malenia.ipynb is not in book/_toc.yml"):
        build.contents(paths, [])
    for name in ("malenia", "nullbus"):
        (paths.notebooks / f"{name}.ipynb").unlink()
    with pytest.raises(BuildError, match="lists notebooks/nullbus, and there is no notebooks/nullbus.ipynb"):
        build.contents(paths, [])


def test_a_variant_has_labels_of_its_own():
    text = "(eq)=\n$$ a $$ (eq-z)\n```{figure} f\n:name: fig\n```\n{eq}`eq-z` [x](#eq) {ref}`the figure <fig>` eq fig"
    notebook = {"cells": [{"cell_type": "markdown", "source": text}]}
    build._relabel(notebook, "busi")
    assert notebook["cells"][0]["source"] == (
        "(eq-busi)=\n$$ a $$ (eq-z-busi)\n```{figure} f\n:name: fig-busi\n```\n"
        "{eq}`eq-z-busi` [x](#eq-busi) {ref}`the figure <fig-busi>` eq fig"
    )


def test_pages_are_rendered_once_and_a_warning_keeps_the_old_ones(paths, capsys):
    assert build.main(["html"], root=paths.root) == 0
    before = (paths.html / "index.html").stat().st_mtime_ns
    started = time.monotonic()
    assert build.main(["html"], root=paths.root) == 0
    assert time.monotonic() - started < 5 and "unchanged: not rendered again" in capsys.readouterr().out
    (paths.book / "index.md").write_text("# Broken\n\n[a chapter](notebooks/nowhere.ipynb)\n")
    assert build.main(["html"], root=paths.root) == 1
    said = capsys.readouterr()
    assert "notebooks/nowhere.ipynb" in said.out and "the pages could not be rendered" in said.err
    assert (paths.html / "index.html").stat().st_mtime_ns == before
    assert build.main(["clean"], root=paths.root) == 0 and not paths.build.exists()


def test_what_needs_a_network_is_found(tmp_path):
    (tmp_path / "good.html").write_text('<a href="https://a.org">x</a><script src="_static/a.js"></script>')
    (tmp_path / "good.css").write_text('/* https://a.org */ a { background: url("data:image/png;base64,AA") }')
    assert build.network_needs(tmp_path) == []
    (tmp_path / "bad.html").write_text(
        '<script defer src="https://cdn.org/a.js"></script><link rel="stylesheet" href="//b.org/c.css">'
        "<img src='http://c.org/d.png'>"
    )
    (tmp_path / "bad.css").write_text('@import "https://d.org/e.css"; a { background: url(https://f.org/g.woff) }')
    assert len(build.network_needs(tmp_path)) == 5


def test_vendored_files_are_the_published_ones():
    vendor = ROOT / "book/_vendor"
    listed = dict(re.findall(r"^\| `(.*?)` \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE))
    files = {
        str(path.relative_to(vendor)): path for path in vendor.rglob("*") if path.is_file() and path.name != "README.md"
    }
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_one_file_names_the_repository():
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    named = [
        path
        for path in (ROOT / "book").rglob("*.*")
        if path.suffix in (".md", ".py", ".yml") and url in path.read_text()
    ]
    assert named == []
