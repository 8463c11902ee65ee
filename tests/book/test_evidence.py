"""The generated pages: what they say is what the records say, every link leads somewhere, nothing needs a network."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_printed import CLAIMS, edit, write_book

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book"))  # book/ is a folder of scripts, not a package

import build  # noqa: E402
import evidence  # noqa: E402

AUDIT = CLAIMS[0] | {"id": "tiny-audit", "kind": "audit", "topic": "leak", "statement": "Words < masks & more."}
OTHER = CLAIMS[1] | {"id": "far-dice", "paper": "far", "paper_value": "82 ± 3"}


@pytest.fixture
def book(tmp_path):
    book = write_book(tmp_path)
    (book / "claims.yml").write_text(yaml.safe_dump([*CLAIMS, OTHER]))
    return book


def gathered(book, cache=None):
    pages = {path.stem: path for path in (book / "published").glob("*.ipynb")}
    titles = {"tiny": "Tiny: a page", "far": "Far: a paper"}
    return evidence.gather(book, pages, [book / "published/records"], book / "data", titles, ["d", "rare"], cache)


def written(book, folder):
    folder.mkdir(exist_ok=True)
    below = evidence.write(folder, gathered(book))
    return below, {path.name: path.read_text() for path in folder.iterdir()}


def test_the_pages_say_what_the_records_say(book, tmp_path):
    below, pages = written(book, tmp_path / "out")
    assert below == ["claims_tiny", "claims_far"]
    row = next(line for line in pages["ledger.md"].splitlines() if "claims_tiny.html#tiny-gain" in line)
    assert 'data-verdict="supported"' in row and 'data-holm="supported"' in row and 'data-level="P"' in row
    assert "0.105 dsc" in row and "20 patients" in row and 'href="notebooks/tiny.html#claims"' in row
    assert all(f"what_was_run.html#run-{key}" in row for key in ("new0", "old1"))
    missing = next(line for line in pages["ledger.md"].splitlines() if "#tiny-dice" in line)
    assert 'data-verdict="not run"' in missing
    assert "3 claims of 2 papers" in pages["ledger.md"]
    strip = next(line for line in pages["claims_matrix.md"].splitlines() if "#tiny-gain" in line)
    assert "New beats old. supported: 0.105 dsc" in strip and "20 patients" in strip


def test_an_edited_record_changes_the_pages(book, tmp_path):
    before = written(book, tmp_path / "out")[1]
    edit(book / "published/records/new0/cases.csv", "0.5,0.", "0.5,0.0")
    after = written(book, tmp_path / "out")[1]
    for name in ("ledger.md", "claims_tiny.md", "claims_matrix.md"):
        assert before[name] != after[name] and "0.105 dsc" not in after[name]


def test_what_was_judged_is_kept_until_something_changes(book, tmp_path, monkeypatch):
    cache = tmp_path / "evidence.json"
    first = gathered(book, cache)
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "check", None)
        again = gathered(book, cache)
    assert again == first
    edit(book / "published/records/new0/cases.csv", "0.5,0.", "0.5,0.0")
    assert gathered(book, cache).judged != first.judged


def test_each_paper_has_its_claims_with_source_and_contrast(book, tmp_path):
    pages = written(book, tmp_path / "out")[1]
    tiny = pages["claims_tiny.md"]
    for said in (
        'id="tiny-gain"',
        "+.12 Dice",
        "Table 1",
        "minus arm <code>old</code>",
        "expects it above 0.",
        "abstract",
    ):
        assert said in tiny
    assert "not run: it needs level F (the paper&#x27;s own data, weights and budget), and the runs reach P" in re.sub(
        r"<[^>]+>", "", tiny
    )
    assert "no page of this paper has been published yet" in pages["claims_far.md"]


def test_what_was_not_run_says_why(book, tmp_path):
    rows = [CLAIMS[0] | {"id": f"tiny-{i}", "contrast": CLAIMS[0]["contrast"] | more} for i, more in enumerate((
        {"a": {"arm": "third", "test": "t"}}, {"a": {"arm": "new", "test": "u"}}))]  # fmt: skip
    (book / "claims.yml").write_text(yaml.safe_dump([*CLAIMS, OTHER, *rows]))
    page = written(book, tmp_path / "out")[1]["not_run.md"]
    assert "4 of 5 claims and audits" in page and "no published run has the arm third" in page
    assert "no published run of the arm new has the test u" in page
    assert "`rare`" in page and "`d`" not in page
    assert "No run of this book reaches level **S**" in page and "**P**" not in page


def test_stale_runs_are_listed_with_what_changed(book, tmp_path):
    page = written(book, tmp_path / "out")[1]["stale.md"]
    assert "4 of the 4 runs that the book shows are stale, 0 are current." in page
    assert "not in this copy&#x27;s history" in page and "settings since:" in page


def test_the_audit_has_topics_spread_and_escapes_what_it_quotes(book, tmp_path):
    (book / "audit.yml").write_text(yaml.safe_dump([AUDIT]))
    page = written(book, tmp_path / "out")[1]["audit.md"]
    assert "## What the words give away" in page and 'href="#tiny-audit"' in page and 'id="tiny-audit"' in page
    assert "Words &lt; masks &amp; more." in page and "Words < masks" not in page
    far = next(line for line in page.splitlines() if "Far" in line and "<td" in line and ">1<" in line)
    assert far.count(">1<") == 2  # one number quoted, and that one with its spread


def test_every_link_leads_to_a_page_and_place(book, tmp_path):
    (book / "audit.yml").write_text(yaml.safe_dump([AUDIT]))
    pages = written(book, tmp_path / "out")[1]
    ids = {name.replace(".md", ".html"): set(re.findall(r'id="([^"]+)"', text)) for name, text in pages.items()}
    runs = {f"run-{key}" for key in ("new0", "new1", "old0", "old1")}
    ids |= {"what_was_run.html": runs, "notebooks/tiny.html": {"claims", "audit"}}
    for name, text in pages.items():
        assert "http" not in text and "src=" not in text.replace('src="_static/ledger.js"', "")
        for link in re.findall(r'href="([^"]+)"', text):
            page, _, place = link.partition("#")
            assert not place or place in ids[page or name.replace(".md", ".html")], f"{name} links to {link}"
            assert not page or page in ids, f"{name} links to {link}"


def test_tables_can_be_read_aloud_and_reached_by_keyboard(book, tmp_path):
    pages = written(book, tmp_path / "out")[1]
    for text in pages.values():
        for table in re.findall(r"<div[^>]*><table.*?</table>|<div[^>]*>\n<table.*?</table>", text, re.DOTALL):
            assert 'role="region"' in table and 'tabindex="0"' in table and "<caption>" in table
            heads = table.count('role="columnheader"')
            for row in re.findall(r'<tr role="row"(?: data[^>]*)?>(<th scope="row".*?)</tr>', table):
                assert row.count("<td") + 1 == heads and row.count('role="cell"') + 1 == heads
    symbols = re.findall(r'<span class="verdict[^"]*"[^>]*>[^<]*(?:<b[^>]*>)?[●✕◐○]', "".join(pages.values()))
    assert symbols and all("aria-hidden" in symbol for symbol in symbols)


def test_a_page_that_disagrees_stops_the_build(tmp_path):
    book = write_book(tmp_path)
    for folder in ("notebooks", "_build/source"):
        (tmp_path / folder).mkdir(parents=True)
    paths = build.Paths.at(tmp_path)
    assert build.write_evidence(paths, build.pages_of(paths)) == ["claims_tiny"]
    edit(book / "published/tiny.ipynb", 'text/plain": "0.7', 'text/plain": "0.8')
    with pytest.raises(build.BuildError, match="a published page and its records disagree: tiny: the number 'dice'"):
        build.write_evidence(paths, build.pages_of(paths))


def test_a_book_without_claims_has_the_pages_all_the_same(tmp_path):
    empty = evidence.gather(tmp_path, {}, [], tmp_path, {})
    assert evidence.write(tmp_path, empty) == []
    assert "No claim is part of this build." in (tmp_path / evidence.MATRIX).read_text()


def test_generated_pages_stand_below_the_ledger(tmp_path):
    toc = {"root": "index", "parts": [{"chapters": [{"file": "ledger"}, {"file": "audit"}]}]}
    paths = build.Paths.at(tmp_path)
    paths.book.mkdir()
    (paths.book / "_toc.yml").write_text(yaml.safe_dump(toc))
    entries = build.contents(paths, [], below={"ledger": ["claims_tiny"]})["parts"][0]["chapters"]
    assert entries == [{"file": "ledger", "sections": [{"file": "claims_tiny"}]}, {"file": "audit"}]
