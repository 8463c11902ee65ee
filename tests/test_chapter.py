import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from lib import chapter
from lib.facts import Fact, seal
from lib.ledger import Claim, Verdict
from lib.printed import read_page

ROOT = Path(__file__).parents[1]
RULES = {"profile": ("smoke", "quick"), "dropout": (float, lambda p: 0 <= p < 1), "seeds": int, "dataset": str}


def given(**changes):
    return {"profile": "quick", "dropout": 0.5, "seeds": 0, "dataset": "phantom_bus"} | changes


def test_good_parameters_come_back():
    p = chapter.parameters(given(dropout=0), **RULES)
    assert vars(p) == {"profile": "quick", "dropout": 0, "seeds": 0, "dataset": "phantom_bus"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, r"unknown parameter 'seed' \(did you mean 'seeds'\?\); valid are: profile \(smoke \| quick\)"),
        ({"profile": "quik"}, r"profile = 'quik' is not valid: expected smoke \| quick \(did you mean 'quick'\?\)"),
        ({"profile": ["quick"]}, r"profile = \['quick'\] is not valid"),
        ({"dropout": 1.5}, r"dropout = 1.5 is not valid: expected float in its range; the parameters are: profile"),
        ({"dropout": "0.5"}, r"dropout = '0.5' is not valid"),
        ({"seeds": 1.0}, r"seeds = 1.0 is not valid: expected int"),
        ({"seeds": True}, r"seeds = True is not valid"),
        ({"dataset": None}, r"dataset = None is not valid: expected str"),
    ],
)
def test_a_bad_parameter_is_one_sentence_with_the_valid_ones(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        chapter.parameters(given(**changes), **RULES)
    assert "\n" not in str(caught.value) and "seeds (int)" in str(caught.value)


def test_a_parameter_that_the_cell_does_not_set_is_named():
    namespace = given()
    del namespace["seeds"]
    with pytest.raises(ValueError, match="'seeds' is not set: give it a value in the cell tagged 'parameters'"):
        chapter.parameters(namespace, **RULES)


def test_imports_and_what_ipython_leaves_are_no_parameters():
    session = {"In": [""], "Out": {}, "_i1": "x", "__name__": "__main__", "Path": Path, "json": json, "exit": object()}
    chapter.parameters(given(**session), **RULES)


def test_running_the_first_cell_again_does_not_trip_over_later_variables():
    namespace = given()
    chapter.parameters(namespace, **RULES)
    namespace["best"] = 0.7
    assert chapter.parameters(namespace, **RULES).seeds == 0


def test_papermill_called_bare_fails_on_a_mistyped_name(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("seeds = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("from lib import chapter\nchapter.parameters(globals(), seeds=int)"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "in.ipynb")
    options = ["-k", "python3", "--language", "python", "--no-progress-bar", "-p", "sedes", "2"]
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ValueError: unknown parameter 'sedes' (did you mean 'seeds'?); valid are: seeds (int)." in done.stderr


@pytest.fixture
def record(tmp_path):
    (tmp_path / "cases.csv").write_text("dsc\n0.5\n")

    def of(key="ab" * 32, **meta):
        facts = {"commit": "1234567890", "dirty": False, "device": "cpu", "seconds": 12.34, "peak_memory_mb": 1321.0}
        return SimpleNamespace(key=key, arm="mixed", meta=facts | meta, folder=tmp_path)

    return of


def bundle(strip):
    return strip._repr_mimebundle_()


def test_provenance_names_the_run_the_machine_and_the_command(record):
    data, metadata = bundle(chapter.provenance(record(), "papermill a.ipynb b.ipynb -p x '<y>'"))
    assert '<a href="../what_was_run.html#run-abababababab">abababab</a>' in data["text/html"]
    for fact in ("1 run", "commit 1234567", "cpu", "12 s", "memory gained 1,321 MB", "&lt;y&gt;"):
        assert fact in data["text/html"]
    table = hashlib.sha256(b"dsc\n0.5\n").hexdigest()
    made = {"records": ["ab" * 32], "arms": [["ab" * 32, "mixed"]], "tables": {"ab" * 32: table}}
    assert metadata == {"prompt_to_mask": made}


def test_provenance_of_many_runs_adds_up(record):
    records = [record(key=f"{i}" * 64, seconds=1800, peak_memory_mb=i, dirty=i == 2) for i in range(6)]
    data, metadata = bundle(chapter.provenance(records, "make book"))
    for fact in ("6 runs", "commit 1234567, 1234567+", "3.0 h", "memory gained 5 MB", "<details>"):
        assert fact in data["text/html"]
    assert len(metadata["prompt_to_mask"]["records"]) == 6
    with pytest.raises(ValueError, match="at least one run record"):
        chapter.provenance([], "make book")


def test_command_says_only_what_differs_from_the_notebook(tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell('profile = "quick"\nseeds = 0\ndata = "data"', metadata={"tags": ["parameters"]})
    (tmp_path / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks/tiny.ipynb")
    monkeypatch.setattr(chapter, "ROOT", tmp_path)
    chosen = SimpleNamespace(profile="quick", seeds=3, data="/elsewhere")
    assert chapter.command("tiny", chosen) == "papermill notebooks/tiny.ipynb out.ipynb -p profile quick -p seeds 3"


def test_source_shows_where_the_code_stands():
    text = chapter.source(chapter.Strip).data
    assert text.startswith("`lib/chapter.py`, line ") and "```python\nclass Strip:" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (SimpleNamespace(mean=0.714, low=0.661, high=0.7521), "0.71 (0.66–0.75)"),
        ((-0.021, -0.05, 0.0099), "−0.02 (−0.05 to 0.01)"),
        (-0.001, "0.00"),
        (12, "12"),
        ("busi", "busi"),
    ],
)
def test_glue_pastes_a_number_with_its_interval_and_no_quotes(value, text, monkeypatch):
    assert pasted_by(monkeypatch, chapter.glue, "it", value)[0] == {"text/plain": text}


def pasted_by(monkeypatch, give, name, *what):
    """What a call of glue or say hands to the page: data and metadata."""
    pasted = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: pasted.update({name: bundle(value)}))
    give(name, *what)
    return pasted[name]


def test_a_sentence_is_pasted_as_markdown_with_its_seal(monkeypatch):
    data, metadata = pasted_by(monkeypatch, chapter.say, "it", "On **bus** `film` leads.")
    assert data["text/markdown"] == "On **bus** `film` leads."
    assert metadata["prompt_to_mask"]["said"] == {"sha256": seal("it", "On **bus** `film` leads."), "facts": []}


def test_a_fact_goes_with_what_says_it(monkeypatch):
    gain = Fact("effect", ["dsc", ["a", "t"]], {"dataset": ["d"]}, 3, False, "0.512 (0.401–0.613)")
    for give, what in ((chapter.glue, (gain,)), (chapter.say, (f"It reaches {gain}.", [gain]))):
        data, metadata = pasted_by(monkeypatch, give, "it", *what)
        said = metadata["prompt_to_mask"]["said"]
        assert gain.text in data["text/plain"] and [one["text"] for one in said["facts"]] == [gain.text]
        assert said["sha256"] == seal("it", data["text/plain"], said["facts"])
    with pytest.raises(ValueError, match="'it' does not say '0.512"):
        chapter.say("it", "It reaches 0.5.", [gain])


def test_a_notebook_keeps_seals_and_facts_where_a_page_is_read(tmp_path):
    cells = [
        "import pandas as pd\nfrom lib import chapter\n"
        "row = {'level': 'P', 'dataset': 'd', 'seed': 0, 'arm': 'a', 'test': 't', 'threshold': 0.5, 'worded': True}\n"
        "table = pd.DataFrame([row | {'case_id': f'c{i}', 'patient_id': f'p{i}', 'dsc': i / 10} for i in range(9)])\n"
        "mean = chapter.fact('effect', table, 'dsc', ('a', 't'), digits=2)\n"
        "chapter.say('found', f'**It** is {mean}.', [mean])\n"
        "chapter.glue('mean', mean)\nchapter.glue('n', 9)"
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), tmp_path / "in.ipynb")
    options = ["-k", "python3", "--language", "python", "--no-progress-bar"]
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "page.ipynb"), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    texts = read_page(tmp_path / "page.ipynb").texts
    mean = texts["mean"].text
    assert texts["found"].text == f"**It** is {mean}." and mean.startswith("0.40 (0.")
    assert texts["n"].text == "9" and all(one.seal == seal(name, one.text, one.facts) for name, one in texts.items())
    assert texts["found"].facts == texts["mean"].facts and texts["mean"].facts[0]["where"]["dataset"] == ["d"]


def test_verdict_table_shows_effect_level_and_verdict():
    side = {"arm": "a", "test": "t"}
    contrast = {"metric": "dsc", "a": side, "value": 0, "expect": "more"}
    claim = Claim(id="a", paper="x", kind="mechanism", statement="nulls > zeros", source="s", paper_value="+9.2",
                  contrast=contrast)  # fmt: skip
    ran = Verdict(claim=claim, level="P", effect=(0.05, 0.01, 0.09), n_cases=7, n_patients=6, n_seeds=1,
                  p=0.04, p_holm=0.08, verdict="supported", keys=("k1", "k2"))  # fmt: skip
    not_run = Verdict(claim=claim, level="R", verdict="not run", keys=("k1",))
    data, metadata = bundle(chapter.verdict_table([ran, not_run]))
    assert "nulls &gt; zeros" in data["text/html"] and "<b>0.050</b> dsc<br>(0.010–0.090)" in data["text/html"]
    assert "7 cases<br>6 patients<br>1 seed<" in data["text/html"] and data["text/html"].count("not run") == 1
    assert data["text/html"].count("after Holm: inconclusive") == 1
    assert metadata["prompt_to_mask"]["records"] == ["k1", "k2"]


def test_setup_goes_to_the_repository_only_from_inside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    chapter.setup()
    assert os.getcwd() == str(ROOT)
    monkeypatch.chdir(tmp_path)
    chapter.setup()
    assert os.getcwd() == str(tmp_path)


def test_book_finds_the_claims():
    assert chapter.book("claims.yml") == ROOT / "book/claims.yml"


def test_a_warning_does_not_show_where_the_code_lies(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    chapter.setup()
    said = warnings.formatwarning("a prompt is too long", UserWarning, __file__, 1)
    assert said == "UserWarning: a prompt is too long\n"
