"""What a page prints and what its records say cannot part without `python -m lib.ledger verify` saying where."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from lib import chapter, ledger, printed
from lib.facts import Said, fact
from lib.records import published_records
from lib.statistics import shown

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"a": {"arm": "new", "test": "t"}, "b": {"arm": "old", "test": "t"}}
CLAIMS = [
    {"id": "tiny-gain", "paper": "tiny", "kind": "mechanism", "statement": "New beats old.", "source": "Table 1",
     "paper_value": "+.12 Dice", "contrast": {"metric": "dsc", **SIDES, "expect": "more"}},
    {"id": "tiny-dice", "paper": "tiny", "kind": "number", "statement": "The Dice is .81.", "source": "abstract",
     "contrast": {"metric": "dsc", "a": SIDES["a"], "value": 0.81, "expect": "equal", "margin": 0.01}, "levels": ["F"]},
]  # fmt: skip
CELLS = """chapter.glue("dice", ledger.effect(table, "dsc", ("new", "t")) if new else "not run")
if both:
    chapter.glue("gain", ledger.effect(table, "dsc", ("new", "t"), ("old", "t")), 3)
else:
    chapter.glue("gain", "not run")
chapter.glue("n_supported", str(sum(v.verdict == "supported" for v in results)))
chapter.glue("flops", f"{cost:.2f}")
easy = table[(table["dsc"] > 0.6) & table["dataset"].isin(["d"])].copy()
chapter.glue("easy", ledger.effect(easy, "dsc", ("new", "t")))
chapter.glue("own", ledger.effect(easy[easy["mine"]], "dsc", ("new", "t")))
"""


def write_record(folder, key, arm, seed, dsc, datasets=("d",)):
    cases = pd.concat(
        [
            pd.DataFrame(
                {"test": "t", "dataset": name, "case_id": [f"c{i}" for i in range(len(dsc))],
                 "patient_id": [f"p{i}" for i in range(len(dsc))], "threshold": 0.5, "dsc": dsc, "worded": True}
            )
            for name in datasets
        ]
    )  # fmt: skip
    (folder / key).mkdir(parents=True)
    cases.to_csv(folder / key / "cases.csv", index=False)
    (folder / key / "log.csv").write_text("step\n1\n")
    prompts = {"perturbation": "none"}
    settings = {
        "model": "unet",
        "loss": "dice",
        "seed": seed,
        "train": ["d"],
        "prompts": prompts,
        "tests": [{"name": "t", "dataset": name, "prompts": prompts} for name in datasets],
    }
    known = {name: {"level": "P"} for name in datasets}
    meta = {"fit_key": key, "levels": dict.fromkeys(datasets, "P"), "datasets": known, "commit": "0" * 40}
    meta |= {"dirty": False, "device": "cpu", "seconds": 1.0, "peak_memory_mb": 1.0}
    record = {"key": key, "arm": arm, "experiment": settings, "meta": meta}
    (folder / key / "record.json").write_text(json.dumps(record))


def glued(name, text, facts=None, markdown=False):
    """A cell's output as chapter.glue or chapter.say leaves it; with no list of facts, as both left it before seals."""
    kind = "application/papermill.record/"
    data, note = {f"text/{'markdown' if markdown else 'plain'}": text}, {}
    if facts is not None:
        data, note = Said(name, text, facts, markdown)._repr_mimebundle_()
    data = {f"{kind}{form}": said for form, said in data.items()}
    return {
        "output_type": "display_data",
        "data": data,
        "metadata": note | {"scrapbook": {"name": name, "mime_prefix": kind}},
    }


def displayed(strip):
    data, metadata = strip._repr_mimebundle_()
    return {"output_type": "display_data", "data": data, "metadata": metadata}


def cell(source, *outputs):
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": list(outputs), "execution_count": 1}


def write_book(folder, summary="The paper says .81; here it is {glue:text}`dice`.", rename=None):
    """A book with one published page, printed by the chapters' own functions from the records beside it."""
    book = folder / "book"
    records = book / "published/records"
    scores = np.random.default_rng(0).uniform(0.5, 0.7, 20)
    for seed in range(2):
        write_record(records, f"old{seed}", "old", seed, scores)
        write_record(records, f"new{seed}", "new", seed, scores + 0.1 + 0.01 * seed, ("d", "elsewhere"))
    rows = yaml.safe_dump(CLAIMS).replace("arm: old", f"arm: {rename or 'old'}")
    (book / "claims.yml").write_text(rows)
    (book / "audit.yml").write_text("")
    loaded = [printed.load_record(path) for path in sorted(records.iterdir())]
    if rename:
        loaded = [SimpleNamespace(**vars(r) | {"arm": r.arm.replace("old", rename)}) for r in loaded]
    results = ledger.verdicts(ledger.load_claims(book / "claims.yml"), loaded)
    table = ledger.inside(ledger.collect(loaded), {"d"})
    new, old = ("new", "t"), (rename or "old", "t")
    outputs = [
        glued("dice", shown(ledger.effect(table, "dsc", new), 2)),
        glued("gain", shown(ledger.effect(table, "dsc", new, old), 3)),
        glued("n_supported", "1"),
        glued("flops", "0.01"),
        glued("easy", shown(ledger.effect(table[table["dsc"] > 0.6], "dsc", new), 2)),
        glued("own", "0.33"),
        glued("old", "It was said that 0.9 is old.", markdown=True),
    ]
    gain, arms = fact("effect", table, "dsc", new, old), [new, old]
    share = fact("among", table, "dsc", arms, new, 1, percent=True)
    best = fact("ranked", table, "dsc", arms, 1)
    found = f"**d**: `{best}` is first in {share} of resamples, by {gain}; 7 of 9 readers agree."
    outputs += [glued("found", found, [gain, share, best], markdown=True), glued("sealed", "37 cases", [])]
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": f"# Tiny: a page\n\n## 1. In one minute\n\n{summary}"},
        {"cell_type": "markdown", "metadata": {}, "source": "## 2. The idea\n\nA width of 0.37 is ours."},
        {"cell_type": "markdown", "metadata": {}, "source": "## 5. What it means for the papers\n\nA chapter found 3."},
        cell(CELLS.replace('"old"', f'"{rename or "old"}"'), *outputs),
        cell("display(...)", displayed(chapter.verdict_table(results)), displayed(chapter.provenance(loaded, "make"))),
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (book / "published/tiny.ipynb").write_text(json.dumps(notebook))
    return book


@pytest.fixture
def book(tmp_path):
    return write_book(tmp_path)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def said(book):
    return [str(one) for one in printed.verify(book).disagreements]


def test_a_page_that_its_records_made_agrees(book):
    report = printed.verify(book)
    assert report.disagreements == []
    assert (report.pages, report.records, report.verdicts) == (1, 4, 2)
    assert (report.numbers, report.sealed, report.unchecked) == (4 + 3, 2, 2 + 3)


def test_a_table_that_no_number_of_the_prose_needs_is_held_as_well(book):
    path = book / "published/records/new0/cases.csv"
    path.write_text(path.read_text() + "\n")  # read as the same numbers: figures could show others all the same
    changed = "found 'a table that was changed since; publish the page again'"
    assert said(book) == [f"tiny: the per-case table of a run: printed 'new0', {changed}"]


def test_an_edited_record_is_named_with_page_claim_and_records(book, capsys):
    edit(book / "published/records/new0/cases.csv", "0.5,0.", "0.5,0.0")
    lines = said(book)
    assert any(line.startswith("tiny: claim tiny-gain at level P, effect: printed '0.1") for line in lines)
    assert any("the number 'dice' in the prose" in line and "new0, new1" in line for line in lines)
    assert printed.main(["verify", "--book", str(book)]) == 1
    assert "DISAGREES tiny: claim tiny-gain" in capsys.readouterr().out


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("</span>", "", None),
        ("\\u25cf</b> supported", "\\u25cf</b> inconclusive", "claim tiny-gain at level P, verdict"),
        ("20 patients", "40 patients", "claim tiny-gain at level P, amount"),
        ("after Holm: supported", "after Holm: inconclusive", "claim tiny-gain at level P, after Holm"),
        ('text/plain": "0.7', 'text/plain": "0.8', "the number 'dice' in the prose"),
        ('text/plain": "1"', 'text/plain": "2"', "the number 'n_supported' in the prose"),
        ("here it is", "here it is 0.74 or", "a typed number: printed '0.74'"),
        ("here it is", "here it is 14 points more or", "a typed number: printed '14'"),
        ("here it is", "it is supported and", "a typed verdict: printed 'is supported'"),
        ("A chapter found 3.", "A chapter found 37 %.", "a typed number: printed '37'"),
        ('"new0"', '"new9"', "a run record: printed 'new9', found 'no record of this key'"),
        ("7 of 9 readers", "8 of 9 readers", "the text 'found' of the prose: printed '**d**: `new` is"),
        ("in 100 % of resamples", "in 99 % of resamples", "among in the text 'found' of the prose: printed '100 %'"),
        ("100 %", "99 %", "among in the text 'found' of the prose: printed '99 %', found '100 %'"),
        ('["new", "t"], 1]', '["old", "t"], 1]', "among in the text 'found' of the prose: printed '100 %'"),
        ("37 cases", "38 cases", "the text 'sealed' of the prose: printed '38 cases', found 'another seal"),
        ("It was said that 0.9", "It was said that 0.8", None),  # as before there were seals
        ('text/plain": "0.105', 'text/plain": "not run", "was": "0.105', "the number 'gain' in the prose: printed"),
    ],
)
def test_an_edited_page_is_caught(book, old, new, what):
    edit(book / "published/tiny.ipynb", old, new)
    lines = said(book)
    assert any(what in line for line in lines) if what else lines == []


def test_a_claim_changed_added_or_dropped_asks_for_a_new_page(book):
    rows = [CLAIMS[0] | {"id": "tiny-new"}, CLAIMS[1]]
    (book / "claims.yml").write_text(yaml.safe_dump(rows))
    lines = said(book)
    assert any("tiny-new at level P: printed 'nothing', found 'supported; publish the page again'" in x for x in lines)
    assert any("tiny-gain at level P: printed 'supported', found 'no such claim" in line for line in lines)
    changed = CLAIMS[0]["contrast"] | {"margin": 0.5}
    (book / "claims.yml").write_text(yaml.safe_dump([CLAIMS[0] | {"contrast": changed}, CLAIMS[1]]))
    assert any("verdict: printed 'supported', found 'not supported'" in line for line in said(book))


def test_a_damaged_record_is_no_traceback(book):
    (book / "published/records/old1/cases.csv").write_text("")
    assert any("a run record: printed 'old1', found 'Run record" in line for line in said(book))


def test_a_run_may_have_another_name_on_its_page(tmp_path):
    assert said(write_book(tmp_path, rename="before")) == []


def test_a_dataset_that_no_arm_learned_from_does_not_judge(book):
    records = [printed.load_record(path) for path in sorted((book / "published/records").iterdir())]
    results = ledger.verdicts(ledger.load_claims(book / "claims.yml"), records)
    assert results[0].dataset == "d" and results[0].n_cases == 20
    table = ledger.collect(records)
    assert set(ledger.inside(table, {"other"})["dataset"]) == {"d", "elsewhere"}  # a test on unseen data alone stays


FINE = """It says .81 or 0.810, `x = 0.3`, [a](b/2602.1.html) arXiv 2602.14498v1, 1.5 mm, 2 h, version 1.2.3, .12.
Means with 95 % intervals, seven ways, four of five studies, 5 seeds, 40 dots in a figure, and {glue:text}`n` of 5.
The table holds numbers, two things can fail: this and that. Does it hold? Supported by a grant; ✕ not supported."""
TYPED = {
    "It reaches .82 and 0.9.": ["0.82", "0.9"],
    "It wins by 14 points (87 %), is supported, 3 of 5 fail.": ["14", "87", "3 of 5", "is supported", "fail"],
    "Better by 2 Dice points; the claim is **not supported**.": ["2", "is **not supported"],
    "The mechanism holds on real images and failed here.": ["holds", "failed"],
    "It remains inconclusive, and 90% of it is confirmed.": ["90", "remains inconclusive", "is confirmed"],
}


def test_only_results_and_verdicts_must_not_be_typed():
    claims = {"claims.yml": [ledger.Claim(**row) for row in CLAIMS]}
    assert printed.typed("p", FINE, claims) == []
    for text, found in TYPED.items():
        assert [one.printed for one in printed.typed("p", text, claims)] == found


def test_what_a_paper_prints_may_be_quoted():
    claims = {"claims.yml": [ledger.Claim(**CLAIMS[0] | {"paper_value": "DSC 10 to 30 %, 2.1 points, 7 of 10 sets"})]}
    assert printed.typed("p", "It says 10 to 30 %, 2.1 points and 7 of 10.", claims) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_chapter_types_what_it_found(path):
    claims = {file: ledger.load_claims(ROOT / "book" / file) for file in printed.FILES}
    found = printed.read_page(path).found
    assert "In one minute" in found
    assert list(map(str, printed.typed(path.stem, found, claims))) == []


ALONE = """
import importlib.abc, sys
allowed = {"numpy", "pandas", "dateutil", "pytz", "six", "tzdata", "lib", *sys.stdlib_module_names}
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and (name == "_yaml" or not name.startswith("_")):
            raise ModuleNotFoundError(f"no {name} here", name=name)
sys.meta_path.insert(0, Bare())
from lib.printed import main
sys.exit(main(["verify", "--book", sys.argv[1]]))
"""


def alone(book):
    """Check a book where nothing but numpy and pandas can be imported."""
    return subprocess.run([sys.executable, "-c", ALONE, str(book)], cwd=ROOT, capture_output=True, text=True)


def test_verify_needs_numpy_and_pandas_only(book):
    done = alone(book)
    assert done.returncode == 2 and "install PyYAML to read it" in done.stderr
    assert printed.main(["copy", "--book", str(book)]) == 0
    done = alone(book)
    assert (done.returncode, done.stderr) == (0, "") and "2 verdicts and 7 numbers" in done.stdout


@pytest.mark.timeout(600)
def test_the_committed_book_agrees_where_only_numpy_and_pandas_are_there():
    done = alone(ROOT / "book")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    pages = len(list((ROOT / "book/published").glob("*.ipynb")))
    assert done.stdout.startswith(f"{pages} pages, ") and done.stdout.rstrip().endswith("; 0 disagreements.")


def test_a_copy_of_other_claims_is_caught(book):
    printed.main(["copy", "--book", str(book)])
    assert said(book) == []
    edit(book / "published/claims.json", "tiny-gain", "tiny-gone")
    assert any("claims.json" in line and "lib.ledger copy" in line for line in said(book))


def test_the_books_copies_are_those_of_today():
    for file in printed.FILES:
        path = ROOT / "book" / file
        assert ledger.load_claims(ledger.copy_of(path)) == ledger.load_claims(path), "run 'python -m lib.ledger copy'"


def test_a_page_of_the_book_is_caught_when_its_record_is_edited(tmp_path):
    """The smallest real page: the same check as above, on what is committed."""
    page = min((ROOT / "book/published").glob("*.ipynb"), key=lambda path: len(printed.read_page(path).keys))
    book = tmp_path / "book"
    keys = printed.read_page(page).keys
    for key in keys:
        shutil.copytree(ROOT / "book/published/records" / key, book / "published/records" / key)
    for path in (page, *(ROOT / "book" / file for file in printed.FILES)):
        shutil.copy(path, book / path.relative_to(ROOT / "book"))
    assert said(book) == []
    path = book / "published/records" / keys[0] / "cases.csv"
    cases = pd.read_csv(path)
    cases["dsc"] = 1 - cases["dsc"]
    cases.to_csv(path, index=False)
    assert said(book)


def test_published_records_have_the_names_of_their_page(tmp_path):
    published = write_book(tmp_path, rename="none of it") / "published"
    found = published_records("tiny", published)
    assert sorted((record.arm, record.experiment["seed"]) for record in found) == [
        ("new", 0),
        ("new", 1),
        ("none of it", 0),
        ("none of it", 1),
    ]
    assert published_records("not there", published) == []
