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


def test_a_published_value_has_the_interval_that_its_cases_allow_and_what_level_f_needs(book, tmp_path):
    printed = {"published": 0.81, "against": 0.7, "n_published": 113, "needs": "Images of <both> hospitals."}
    spread = OTHER | {"id": "far-spread", "published": 0.82, "spread": 0.03, "n_published": 25}
    alone = OTHER | {"id": "far-alone", "published": 0.82}
    (book / "claims.yml").write_text(yaml.safe_dump([CLAIMS[0] | printed, spread, alone]))
    pages = written(book, tmp_path / "out")[1]
    ends = [evidence.reconstruct_interval(value, 113) for value in (0.81, 0.7)]
    said = "against".join(f" {one.low:.3f}–{one.high:.3f} " for one in ends)
    assert (
        f"0.81 against 0.7; <em>reconstructed</em> 95 % interval{said}(113 cases, the widest" in pages["claims_tiny.md"]
    )
    assert f"reconstructed</em> 95 % interval{said}" in pages["ledger.md"]
    assert "Judging them at level **F** needs: Images of &lt;both&gt; hospitals." in pages["claims_tiny.md"]
    more = CLAIMS[0] | printed | {"id": "tiny-more"}
    (book / "claims.yml").write_text(
        yaml.safe_dump([more, more | {"id": "tiny-most"}, CLAIMS[0] | {"needs": "A scan."}])
    )
    tiny = written(book, tmp_path / "out")[1]["claims_tiny.md"]
    assert tiny.count("hospitals") == 1 and tiny.count("<dt>Level F needs</dt><dd>A scan.</dd>") == 1
    assert (
        "0.82 ± 0.03; <em>reconstructed</em> 95 % interval 0.808–0.832 (25 cases, from their SD)"
        in pages["claims_far.md"]
    )
    assert "<dd>0.82</dd>" in pages["claims_far.md"]


@pytest.mark.parametrize("more", [{"published": 39.9}, {"contrast": CLAIMS[1]["contrast"] | {"metric": "cindex"}}])
def test_what_is_no_mean_of_cases_has_no_interval(more):
    claim = evidence.Claim(**(OTHER | {"published": 0.69, "n_published": 274} | more))
    assert evidence.published(claim) == f"{claim.published:g}"


def test_an_observation_without_a_contrast_is_listed_and_not_judged(book, tmp_path):
    seen = {key: value for key, value in AUDIT.items() if key != "contrast"}
    seen |= {
        "check": "Read `line <7>`.",
        "matters": "It decides.",
        "topic": "code",
        "statement": "The line is a comment.",
    }
    control = AUDIT | {"id": "tiny-control", "topic": "control"}
    claim = {key: value for key, value in CLAIMS[0].items() if key != "contrast"} | {"id": "tiny-bare"}
    (book / "audit.yml").write_text(yaml.safe_dump([seen, control]))
    (book / "claims.yml").write_text(yaml.safe_dump([*CLAIMS, claim]))
    pages = written(book, tmp_path / "out")[1]
    assert (
        "<dt>How to check</dt><dd>Read <code>line &lt;7&gt;</code>.</dd><dt>Why it matters</dt><dd>It decides.</dd>"
        in pages["audit.md"]
    )
    assert "1 observations about protocols and released code, and 1 controls of ours" in pages["audit.md"]
    row = next(line for line in pages["ledger.md"].splitlines() if "The line is a comment." in line)
    assert 'data-verdict="observation"' in row and "◇" in row and "What is measured" not in row
    assert "The line is a comment." not in pages["not_run.md"]
    assert "no experiment of this book tests it" in pages["not_run.md"] and "tiny-bare" in pages["claims_tiny.md"]
    assert "of which 1 were measured, and 1 that no run of this book could judge" in pages["claims_tiny.md"]


def test_the_front_page_shows_what_holm_leaves_and_marks_one_training(book, tmp_path):
    taken = evidence.Verdict(
        claim=evidence.Claim(**CLAIMS[0]), level="P", dataset="d", verdict="supported", effect=(0.1, 0.01, 0.2),
        p=0.03, p_holm=0.09, n_cases=9, n_patients=9, n_seeds=1,
    )  # fmt: skip
    shown = gathered(book)
    object.__setattr__(
        shown, "judged", {"tiny": {"claims.yml": [taken, taken.__class__(**vars(taken) | {"level": "R"})]}}
    )
    page = evidence.matrix(shown)
    rows = [line for line in page.splitlines() if "#tiny-gain" in line]
    assert len(rows) == 2 and all(f'">{level}</abbr>' in row for level, row in zip("PR", rows, strict=True))
    for row in rows:
        mark = re.search(r'<a [^>]*#tiny-gain"[^>]*>(.)</a>', row)
        assert mark[1] == "◐" and 'class="verdict-open once"' in mark[0]
        assert "inconclusive (supported before Holm): 0.100 dsc" in mark[0] and "one training" in mark[0]
        assert "9<br><small>one training</small>" in row
    assert "after Holm" in page and "rests on one training" in page
    both = evidence.ledger_page(shown)
    assert both.count("9 patients, one training") == 2  # a page that judges at two levels keeps both
    assert "20 patients, 2 seeds" in written(book, tmp_path / "out")[1]["ledger.md"]
