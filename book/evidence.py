"""The pages that say what holds: the claims ledger, a page per paper, the audit, what is stale and what was not run.

All of it is generated from claims.yml, audit.yml and the run records of the pages that the book shows.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import staleness
from lib.figures import VERDICTS
from lib.files import atomic_write
from lib.ledger import ALPHA, CINDEX, FEWEST, LEVELS, TOPICS, Claim, Verdict, load_claims
from lib.printed import FILES, Report, check, read_page
from lib.statistics import reconstruct_interval

MATRIX = "claims_matrix.md"  # a part of a page, for book/index.md to include
CLASSES = {
    "supported": "verdict-supported",
    "not supported": "verdict-against",
    "inconclusive": "verdict-open",
    "not run": "verdict-not-run",
}
OBSERVED = "observation"  # what an audit says that no contrast judges
SYMBOLS = {verdict: symbol for verdict, (symbol, _) in VERDICTS.items()} | {OBSERVED: "◇"}
CLASSES |= {OBSERVED: CLASSES["not run"]}
EXPECTED = {"more": "above", "less": "below", "equal": "within"}
READ = ("record.json", "cases.csv")


@dataclass(frozen=True)
class Evidence:
    """What the pages of this book and their records say.

    claims: file -> rows; judged: page -> file -> verdicts; stale: page -> record key -> what changed since;
    titles: of papers and pages; disagreements: what published pages print and their records do not say.
    """

    claims: Mapping[str, Sequence[Claim]]
    judged: Mapping[str, Mapping[str, Sequence[Verdict]]]
    stale: Mapping[str, Mapping[str, Sequence[str]]]
    records: Mapping[str, Mapping[str, Any]]  # record.json by key
    titles: Mapping[str, str]
    datasets: Sequence[str]  # for which there is a script
    disagreements: Sequence[str]

    @property
    def papers(self) -> list[str]:
        return list(dict.fromkeys(claim.paper for rows in self.claims.values() for claim in rows))

    def pages(self, paper: str) -> list[str]:
        """The pages that judge a paper's claims."""
        return sorted(page for page, files in self.judged.items() if _paper(files) == paper)

    def of(self, claim: Claim) -> dict[tuple[str, str], Verdict]:
        """What was measured of a claim: (page, level) -> verdict, where there is one."""
        return {
            (page, v.level): v
            for page, files in sorted(self.judged.items())
            for results in files.values()
            for v in results
            if v.claim.id == claim.id and v.verdict != "not run"
        }

    def levels(self, page: str) -> list[str]:
        """The levels of data on which a page judges claims."""
        return sorted({v.level for v in self.judged[page].get(FILES[0], ())})

    def where(self, page: str, level: str) -> str:
        """The datasets of a level on which a page's claims were judged."""
        found = {v.dataset for results in self.judged[page].values() for v in results if v.dataset and v.level == level}
        return ", ".join(sorted({name for names in found for name in names.split(", ")}))


def _paper(files: Mapping[str, Sequence[Verdict]]) -> str | None:
    return next((v.claim.paper for results in files.values() for v in results), None)


# --- gathering -------------------------------------------------------------------------------------------------------


def gather(
    book: Path,
    pages: Mapping[str, Path],
    records: Sequence[Path],
    data: Path,
    titles: Mapping[str, str],
    datasets: Sequence[str] = (),
    cache: Path | None = None,
) -> Evidence:
    """Judge all claims from the records of the pages shown; what was judged before from the same files is read back.

    records: folders in which to look for a record, in this order; pages in `book`/published are checked as well.
    """
    claims = {file: load_claims(book / file) for file in FILES if (book / file).is_file()}
    read = {name: read_page(path, name) for name, path in pages.items()} if claims else {}
    folders = {
        key: next((place / key for place in records if (place / key / "record.json").is_file()), None)
        for page in read.values()
        for key in page.keys
    }
    known = {key: json.loads((folder / READ[0]).read_text("utf-8")) for key, folder in folders.items() if folder}
    published = {name for name, path in pages.items() if path.is_relative_to(book)}
    state = _state([book / file for file in claims], pages, published, folders.values(), data)
    stored = json.loads(cache.read_text("utf-8")) if cache and cache.is_file() else {}
    if stored.get("state") != state:
        stored = {"state": state, "judged": {}, "stale": {}, "disagreements": []}
        changed = staleness.changes(list(known.values()), data, together=[set(page.keys) for page in read.values()])
        for name, page in read.items():
            report = Report()
            judged = check(page, records, claims, report)
            stored["judged"][name] = {file: [_stored(v) for v in results] for file, results in judged.items()}
            stored["stale"][name] = {key: changed[key] for key in page.keys if key in changed}
            stored["disagreements"] += map(str, report.disagreements if name in published else ())
        if cache:
            atomic_write(cache, json.dumps(stored))
    rows = {claim.id: claim for part in claims.values() for claim in part}
    judged = {
        name: {file: [_restored(v, rows) for v in results] for file, results in files.items()}
        for name, files in stored["judged"].items()
    }
    given = dict(titles) | {name: page.title for name, page in read.items()}
    return Evidence(claims, judged, stored["stale"], known, given, datasets, stored["disagreements"])


def _state(
    rows: Iterable[Path], pages: Mapping[str, Path], published: set[str], folders: Iterable[Path | None], data: Path
) -> str:
    """Hash all that the evidence is made of: rows, pages, records, the library and the cards of the datasets here."""
    digest = hashlib.sha256(json.dumps([sorted(pages), sorted(published)]).encode())
    library = Path(staleness.HOME)
    files = [*rows, *pages.values(), *sorted((library / "lib").rglob("*.py")), library / "requirements.lock"]
    files += [folder / name for folder in folders if folder for name in READ] + sorted(data.glob("*/card.json"))
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest()


def _stored(v: Verdict) -> dict[str, Any]:
    return {name: value for name, value in vars(v).items() if name != "claim"} | {"claim": v.claim.id}


def _restored(stored: Mapping[str, Any], rows: Mapping[str, Claim]) -> Verdict:
    tuples = {name: tuple(stored[name]) if stored[name] is not None else None for name in ("effect", "keys")}
    return Verdict(**{**stored, **tuples, "claim": rows[stored["claim"]]})


# --- pieces of pages -------------------------------------------------------------------------------------------------


def write(folder: Path, evidence: Evidence) -> list[str]:
    """Write all pages of the evidence into a folder; returns the names of those that go below the ledger."""
    pages = {
        MATRIX: matrix(evidence),
        "ledger.md": ledger_page(evidence),
        "audit.md": audit_page(evidence),
        "stale.md": stale_page(evidence),
        "not_run.md": not_run_page(evidence),
    }
    below = {f"claims_{paper}.md": paper_page(evidence, paper) for paper in evidence.papers}
    for name, text in (pages | below).items():
        (folder / name).write_text(text, encoding="utf-8")
    return [name.removesuffix(".md") for name in below]


def _text(value: Any) -> str:
    return html.escape(str(value))


def _prose(value: str) -> str:
    """A sentence of a row, in which backquotes mark code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(value))


def _lines(value: str) -> str:
    return _text(value).replace("\n", "<br>")


def _short(title: str) -> str:
    return title.partition(":")[0]


def _badge(verdict: str) -> str:
    return f'<span class="{CLASSES[verdict]}"><b aria-hidden="true">{SYMBOLS[verdict]}</b></span> {verdict}'


def _unjudged(claim: Claim) -> str:
    """What stands for a verdict where there is none."""
    return OBSERVED if claim.kind == "audit" and claim.contrast is None else "not run"


def _trainings(v: Verdict) -> str:
    return "one training" if v.n_seeds == 1 else f"{v.n_seeds} seeds"


def _both(v: Verdict) -> str:
    """The raw verdict, and what is left of it after Holm's correction."""
    left = "the same" if v.corrected == v.verdict else _badge(v.corrected)
    return f"{_badge(v.verdict)}<br><small>after Holm: {left}</small>"


def _chapter(evidence: Evidence, page: str, file: str = FILES[0]) -> str:
    room = "audit" if file == FILES[1] else "claims"
    return f'<a href="notebooks/{page}.html#{room}">{_text(_page_title(evidence, page))}</a>'


def _data(evidence: Evidence, page: str, file: str, v: Verdict) -> str:
    return f"{v.level}: {_chapter(evidence, page, file)}<br><small>{_text(v.dataset)}</small>"


def _page_title(evidence: Evidence, page: str) -> str:
    title, (_, _, words) = evidence.titles.get(page, page), evidence.titles.get(page, page).partition(" — ")
    return f"{_short(title)} — {words}" if words else _short(title)


def _runs(keys: Sequence[str]) -> str:
    links = [f'<a href="what_was_run.html#run-{key[:12]}">{key[:8]}</a>' for key in keys]
    if len(links) <= 2:
        return " ".join(links)
    return f"<details><summary>{len(links)} runs</summary>{' '.join(links)}</details>"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt; .001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _table(heads: Sequence[str], rows: Iterable[str], caption: str, name: str = "evidence") -> list[str]:
    """A table that scrolls by itself, and that a keyboard can scroll.

    The roles are said again because the cards of a phone's layout would take them from a screen reader.
    """
    top = "".join(f'<th scope="col" role="columnheader">{head}</th>' for head in heads)
    return [
        f'<div class="{name}" role="region" aria-label="{_text(caption)}" tabindex="0">',
        f'<table role="table"><caption>{_text(caption)}</caption>',
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead><tbody role="rowgroup">',
        *rows,
        "</tbody></table></div>",
        "",
    ]


def _cells(heads: Sequence[str], cells: Sequence[str]) -> str:
    """The cells of a row; the first names it, and each says its column where a phone stacks them."""
    first, *rest = (f'data-head="{_text(head)}">{cell}' for head, cell in zip(heads, cells, strict=True))
    return f'<th scope="row" role="rowheader" {first}</th>' + "".join(f'<td role="cell" {cell}</td>' for cell in rest)


def _count(results: Iterable[str], decided_only: bool = False) -> str:
    """How many of each verdict, as symbols that are also words."""
    results = list(results)
    kinds = list(VERDICTS)[:2] if decided_only else list(VERDICTS)
    return " ".join(
        f'<span class="count" title="{verdict}"><span class="{CLASSES[verdict]}" aria-hidden="true">'
        f'{VERDICTS[verdict][0]}</span> {results.count(verdict)}<span class="visually-hidden"> {verdict},</span></span>'
        for verdict in kinds
    )


def in_words(claim: Claim) -> str:
    """Say what is measured: the contrast as a sentence."""
    c = claim.contrast
    if c is None:
        return ""

    def side(arm: Any) -> str:
        metric = f"{arm.metric} of " if arm.metric else ""
        return f"{metric}arm <code>{_text(arm.arm)}</code> in test <code>{_text(arm.test)}</code>"

    other = side(c.b) if c.b else f"{c.value:g}"
    other = f"{c.times:g} × {other}" if c.times != 1 else other
    margin = f"±{c.margin:g}" if c.expect == "equal" else f"{(c.margin if c.expect == 'more' else -c.margin) + 0.0:g}"
    only = {"worded": ", on cases that have text", "present": ", on structures that are present", "all": ""}[c.cases]
    return f"{_text(c.metric)}: {side(c.a)}, minus {other}{only}; the claim expects it {EXPECTED[c.expect]} {margin}."


# --- the matrix ------------------------------------------------------------------------------------------------------


def matrix(evidence: Evidence) -> str:
    """Return the front page's matrix: for each paper, data and level, a symbol per claim and their counts."""
    heads = ("paper and data", "level", "patients", "each claim, after Holm", "in all", "before Holm")
    rows = []
    for paper in evidence.papers:
        claims = [claim for claim in evidence.claims.get(FILES[0], ()) if claim.paper == paper]
        if not claims:
            continue
        name, link = _text(_short(evidence.titles.get(paper, paper))), f"claims_{paper}.html"
        judged = [(page, level) for page in evidence.pages(paper) for level in evidence.levels(page)]
        for page, level in judged:
            by_claim = {v.claim.id: v for v in evidence.judged[page].get(FILES[0], ()) if v.level == level}
            shown = [(claim, by_claim.get(claim.id)) for claim in claims]
            most = max(by_claim.values(), key=lambda v: (v.n_seeds, v.n_patients))
            cells = [
                f'<a href="{link}">{name}</a><br><small>{_text(evidence.where(page, level))}</small>',
                f'<abbr title="{_text(LEVELS[level])}">{level}</abbr>',
                f"{max(v.n_patients for v in by_claim.values())}<br><small>{_trainings(most)}</small>",
                _strip(shown, link),
                _count(v.corrected if v else "not run" for _, v in shown),
                _count((v.verdict if v else "not run" for _, v in shown), decided_only=True),
            ]
            rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
        if not judged:
            shown = [(claim, None) for claim in claims]
            cells = [
                f'<a href="{link}">{name}</a>',
                "–",
                "–",
                _strip(shown, link),
                _count(["not run"] * len(claims)),
                "–",
            ]
            rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
    if not rows:
        return "No claim is part of this build.\n"
    keyed = " · ".join(_badge(verdict) for verdict in VERDICTS)
    once = f'<span class="once {CLASSES["supported"]}" aria-hidden="true">{SYMBOLS["supported"]}</span>'
    lines = _table(heads, rows, "The papers' claims, by the data that judged them", "evidence matrix")
    lines += [
        f'<p class="key">{keyed}. Symbols say what is left after Holm\'s correction over the claims of their row; '
        f"{once} underlined, it rests on one training, whose luck the interval does not hold. Each opens its claim; "
        '<a href="ledger.html">the ledger</a> has them all, with intervals and runs.</p>',
        "",
    ]
    return "\n".join(lines)


def _strip(shown: Sequence[tuple[Claim, Verdict | None]], link: str) -> str:
    return f'<span class="strip" aria-hidden="true">{"".join(_mark(claim, v, link) for claim, v in shown)}</span>'


def _mark(claim: Claim, v: Verdict | None, link: str) -> str:
    """A symbol that opens its claim; out of the tab order, since the paper's page has the same links with words."""
    verdict = v.corrected if v else "not run"
    effect = f": {v.effect_text}, {v.n_patients} patients, {_trainings(v)}".replace("\n", " ") if v and v.effect else ""
    before = f" ({v.verdict} before Holm)" if v and v.verdict != verdict else ""
    title = _text(f"{claim.statement} {verdict}{before}{effect}")
    looks = f"{CLASSES[verdict]}{' once' if v and v.n_seeds == 1 else ''}"
    return f'<a tabindex="-1" href="{link}#{claim.id}" class="{looks}" title="{title}">{SYMBOLS[verdict]}</a>'


# --- the ledger ------------------------------------------------------------------------------------------------------

LEDGER_HEADS = ("claim", "data", "verdict", "effect, 95 % interval", "p, Holm's p", "made by")


def ledger_page(evidence: Evidence) -> str:
    """Return the page of all claims and audits with what was measured of each, and filters that need no network."""
    rows, filed = [], [(file, claim) for file in FILES for claim in evidence.claims.get(file, ())]
    for file, claim in filed:
        rows += [_ledger_row(evidence, file, claim, page, v) for (page, _), v in evidence.of(claim).items()] or [
            _ledger_row(evidence, file, claim, None, None)
        ]
    n_claims = len(evidence.claims.get(FILES[0], ()))
    lines = [
        "# The claims ledger",
        "",
        f"{n_claims} claims of {len(evidence.papers)} papers, {_observations(evidence)}, with what the runs of this "
        "book say of each. Nobody typed a verdict: [how we judge]"
        "(method.md) has the rules, and `python -m lib.ledger verify` computes all of it again from the records.",
        "",
        "*After Holm* is the verdict that remains when the claims of one paper that a page judges at one level of data "
        f"share an error rate of {ALPHA:.0%}. The correction can take a decision back and never makes one. "
        f"With fewer than {FEWEST} patients nothing is decided, and no p is given. *One training* marks what rests on "
        "a single seed: its interval holds the luck of patients and not that of training. The interval of a published "
        "value is *reconstructed* where a paper prints a mean over a known number of cases.",
        "",
    ]
    lines += _filters(evidence)
    lines += _table(LEDGER_HEADS, rows, "Claims and audits with what was measured", "evidence ledger")
    return "\n".join([*lines, '<script defer src="_static/ledger.js"></script>', ""])


def _filters(evidence: Evidence) -> list[str]:
    """A form that the script shows: without it all rows are there, and a form would promise what it cannot do."""

    def choice(name: str, label: str, options: Mapping[str, str]) -> str:
        every = "".join(f'<option value="{_text(key)}">{_text(text)}</option>' for key, text in options.items())
        return f'<label>{label} <select name="{name}"><option value="">all</option>{every}</select></label>'

    papers = {paper: _short(evidence.titles.get(paper, paper)) for paper in evidence.papers}
    kinds = {"number": "a number", "mechanism": "a mechanism", "audit": "an audit"}
    return [
        '<form class="filters" role="search" aria-label="Choose claims" aria-controls="ledger-rows" hidden>',
        choice("paper", "Paper", papers),
        choice("kind", "Kind", kinds),
        choice("level", "Level", {level: f"{level}: {words}" for level, words in LEVELS.items()}),
        choice("verdict", "Verdict", {verdict: verdict for verdict in SYMBOLS}),
        choice("holm", "After Holm", {verdict: verdict for verdict in VERDICTS}),
        '<label>Words <input type="search" name="words" autocomplete="off"></label>',
        '<button type="reset">All claims</button> <output aria-live="polite"></output></form>',
        "",
    ]


def _observations(evidence: Evidence) -> str:
    """How many audits observe something in a paper, and how many are controls of our own."""
    audits = evidence.claims.get(FILES[1], ())
    own = sum(audit.topic == "control" for audit in audits)
    return f"{len(audits) - own} observations about protocols and released code, and {own} controls of ours"


def _ledger_row(evidence: Evidence, file: str, claim: Claim, page: str | None, v: Verdict | None) -> str:
    verdict, after = (v.verdict, v.corrected) if v else (_unjudged(claim), _unjudged(claim))
    facts = {"paper": claim.paper, "kind": claim.kind, "level": v.level if v else "", "verdict": verdict, "holm": after}
    data = " ".join(f'data-{name}="{_text(value)}"' for name, value in facts.items())
    home = f"audit.html#{claim.id}" if file == FILES[1] else f"claims_{claim.paper}.html#{claim.id}"
    printed = "; ".join(filter(None, (_text(claim.paper_value), _reconstructed(claim))))
    said = f"<br><small>paper: {printed}</small>" if printed else ""
    name = _text(_short(evidence.titles.get(claim.paper, claim.paper)))
    cells = [
        f'<a href="{home}">{_text(claim.statement)}</a>{said}',
        f"{v.level}: {_chapter(evidence, page, file)}<br><small>{_text(v.dataset)}</small>" if v else name,
        _both(v) if v else _badge(verdict),
        _lines(f"{v.effect_text}\n{v.n_patients} patients, {_trainings(v)}") if v else "–",
        f"{_p(v.p)}<br>{_p(v.p_holm)}" if v else "–",
        _runs(v.keys) if v else "–",
    ]
    return f'<tr role="row" {data}>{_cells(LEDGER_HEADS, cells)}</tr>'


# --- a page per paper, and the audit ---------------------------------------------------------------------------------

MEASURED = ("data", "verdict", "effect, 95 % interval", "measured on", "p, Holm's p", "made by")


def _measured(evidence: Evidence, file: str, claim: Claim) -> list[str]:
    rows = []
    for (page, _), v in evidence.of(claim).items():
        cells = [
            _data(evidence, page, file, v),
            _both(v),
            _lines(v.effect_text),
            _lines(v.amount),
            f"{_p(v.p)}<br>{_p(v.p_holm)}",
            _runs(v.keys),
        ]
        rows.append(f'<tr role="row">{_cells(MEASURED, cells)}</tr>')
    if not rows:
        return [f"<p>{_badge(_unjudged(claim))}: {_text(why_not_run(evidence, claim))}</p>", ""]
    return _table(MEASURED, rows, f"What was measured of {claim.id}")


def _section(evidence: Evidence, file: str, claim: Claim, source: str, needs: str = "") -> list[str]:
    """One row with all that is known of it; `needs` is what the page has said already of level F."""
    levels = "; ".join(f"{level}, {LEVELS[level]}" for level in claim.levels)
    facts = {
        "In the paper": _text(claim.paper_value),
        "Published value": published(claim),
        source: _prose(claim.source),
        "How to check": _prose(claim.check),
        "Why it matters": _prose(claim.matters),
        "What is measured": in_words(claim),
        "Can be judged on": "" if set(claim.levels) == set(LEVELS) else _text(levels),
        "Level F needs": _prose(claim.needs) if claim.needs != needs else "",
        "Note": _prose(claim.note),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items() if text)
    return [
        f'<section class="claim" id="{claim.id}">',
        f"<h3>{_text(claim.statement)}</h3>",
        f'<p class="id"><code>{claim.id}</code></p><dl>{listed}</dl>',
        *_measured(evidence, file, claim),
        "</section>",
        "",
    ]


def published(claim: Claim) -> str:
    """Say what the paper prints as a number, with its spread, and the interval that this would have had."""
    if claim.published is None:
        return ""
    spread = f" ± {claim.spread:g}" if claim.spread is not None else ""
    against = f" against {claim.against:g}" if claim.against is not None else ""
    return "; ".join(filter(None, (f"{claim.published:g}{spread}{against}", _reconstructed(claim))))


def _reconstructed(claim: Claim) -> str:
    """The intervals of published means that the number of their cases allows, marked as not the paper's.

    A concordance is no mean of cases, and what is not within [0, 1] (a count of parameters) has no spread over them.
    """
    values = [value for value in (claim.published, claim.against) if value is not None]
    ordered = claim.contrast is not None and claim.contrast.metric == CINDEX
    if not claim.n_published or ordered or not all(0 <= value <= 1 for value in values):
        return ""
    found = [reconstruct_interval(value, claim.n_published, claim.spread) for value in values]
    said = " against ".join(f"{one.low:.3f}–{one.high:.3f}" for one in found)
    how = "from their SD" if claim.spread is not None else "the widest that scores in [0, 1] allow"
    return f"<em>reconstructed</em> 95 % interval {said} ({claim.n_published:,} cases, {how})"


def paper_page(evidence: Evidence, paper: str) -> str:
    """Return a paper's page: each claim with what is printed, what was measured, verdicts, levels and sources."""
    name, pages = _short(evidence.titles.get(paper, paper)), evidence.pages(paper)
    claims = [claim for claim in evidence.claims.get(FILES[0], ()) if claim.paper == paper]
    kinds = {"number": "Numbers of the paper", "mechanism": "Why it works, according to the paper"}
    measured = sum(bool(evidence.of(claim)) for claim in claims)
    needs = max((claim.needs for claim in claims), key=[claim.needs for claim in claims].count, default="")
    lines = [
        f"# {name}: its claims",
        "",
        f"{len(claims)} claims, of which {measured} were measured, and "
        f"{sum(claim.contrast is None for claim in claims)} that no run of this book could judge. "
        + (f"Judged in {', '.join(_chapter(evidence, page) for page in pages)}; " if pages else "No page judges them; ")
        + f'what its protocol and code do is on <a href="audit.html#{paper}">the audit\'s page</a>, and all papers '
        'together are in <a href="ledger.html">the ledger</a>.',
        "",
        *([f"Judging them at level **F** needs: {_prose(needs)}", ""] if needs else []),
    ]
    for kind, heading in kinds.items():
        chosen = [claim for claim in claims if claim.kind == kind]
        if chosen:
            lines += [f"## {heading}", ""]
        for claim in chosen:
            lines += _section(evidence, FILES[0], claim, "Said in", needs)
    return "\n".join(lines)


def audit_page(evidence: Evidence) -> str:
    """Return the audit: what was observed of protocols and released code, by topic and paper, and what it is worth."""
    audits = list(evidence.claims.get(FILES[1], ()))
    topics = {topic: words for topic, words in TOPICS.items() if any(a.topic == topic for a in audits)}
    lines = [
        "# Protocols and released code",
        "",
        "Where a paper's protocol or released code differs from its text, and what the difference is worth where that "
        "can be measured. Each is an observation of a dated version, not a judgement of people: papers are short, and "
        "code moves on. *Supported* means that the runs of this book show the effect that the observation names; "
        f"{_badge(OBSERVED)} marks what anyone can see and no run judges. There are {_observations(evidence)}: "
        "simpler things to hold results against, which say nothing about a paper by themselves.",
        "",
    ]
    heads = ("paper", *topics.values())
    rows = []
    for paper in evidence.papers:
        name = f'<span id="{paper}">{_text(_short(evidence.titles.get(paper, paper)))}</span>'
        cells = [name]
        for topic in topics:
            own = [a for a in audits if a.paper == paper and a.topic == topic]
            cells.append(" ".join(_audit_mark(evidence, audit) for audit in own) or "–")
        rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
    lines += _table(heads, rows, "Observations by paper and topic; each symbol opens one") if audits else []
    lines += ["## Spread", "", *_spread(evidence)]
    for topic, words in topics.items():
        lines += [f"## {words[0].upper()}{words[1:]}", ""]
        for audit in (a for a in audits if a.topic == topic):
            lines += _section(evidence, FILES[1], audit, "Seen in")
    return "\n".join(lines)


def _audit_mark(evidence: Evidence, audit: Claim) -> str:
    verdicts = [v.corrected for v in evidence.of(audit).values()] or [_unjudged(audit)]
    marks = "".join(f'<span class="{CLASSES[verdict]}">{SYMBOLS[verdict]}</span>' for verdict in verdicts)
    title = _text(f"{audit.statement} ({', '.join(verdicts)})")
    return f'<a href="#{audit.id}" title="{title}" aria-label="{title}">{marks}</a>'


def _spread(evidence: Evidence) -> list[str]:
    """How many of the printed numbers come with any spread: counted in the quotations themselves."""
    heads = ("paper", "numbers quoted", "with a spread beside them", "cases where the book has one")
    rows = []
    for paper in evidence.papers:
        numbers = [c for c in evidence.claims.get(FILES[0], ()) if c.paper == paper and c.kind == "number"]
        spread = [c for c in numbers if c.spread is not None or re.search(r"±|\bSD\b|\bCI\b|95 %", c.paper_value)]
        measured = [v for page in evidence.pages(paper) for v in evidence.judged[page].get(FILES[0], ()) if v.effect]
        found = f"{len(measured)} contrasts, each with its interval" if measured else "–"
        cells = [_text(_short(evidence.titles.get(paper, paper))), str(len(numbers)), str(len(spread)), found]
        rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
    return _table(heads, rows, "Printed numbers and their spread") if rows else []


# --- what is stale, what was not run ---------------------------------------------------------------------------------


def stale_page(evidence: Evidence) -> str:
    """Return the page of runs whose key would be another today, with what changed since."""
    keys = {key: reasons for found in evidence.stale.values() for key, reasons in found.items()}
    old = sum(bool(reasons) for reasons in keys.values())
    lines = [
        "# What is stale",
        "",
        "A run's key holds its settings, the code that can change its numbers, the pinned packages and the data. A run "
        "is *stale* when it would get another key today. Its numbers stay true of the commit that made them; a new run "
        "might give others.",
        "",
        f"{old} of the {len(keys)} runs that the book shows are stale, {len(keys) - old} are current.",
        "",
    ]
    heads = ("page", "runs", "commit", "what changed since", "made by")
    rows = []
    for page, found in evidence.stale.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for key, reasons in found.items():
            meta = evidence.records[key]["meta"]
            groups.setdefault((meta["commit"][:7] + "+" * meta["dirty"], *reasons), []).append(key)
        for (commit, *reasons), members in sorted(groups.items(), key=lambda group: -len(group[1])):
            said = "<br>".join(map(_text, reasons)) or "nothing: current"
            cells = [_chapter(evidence, page), str(len(members)), f"<code>{commit}</code>", said, _runs(members)]
            rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
    return "\n".join(lines + (_table(heads, rows, "Runs by page, commit and what changed since") if rows else []))


def not_run_page(evidence: Evidence) -> str:
    """Return the page of claims that nothing here could judge, level by level, and of datasets that no run used."""
    heads = ("claim", "paper", "level", "why")
    rows, groups = [], {}
    for file in FILES:
        for claim in evidence.claims.get(file, ()):
            if not evidence.of(claim) and _unjudged(claim) != OBSERVED:
                groups.setdefault((claim.paper, why_not_run(evidence, claim)), []).append((file, claim))
    for (paper, why), members in groups.items():
        for file, claim in members:
            home = f"audit.html#{claim.id}" if file == FILES[1] else f"claims_{paper}.html#{claim.id}"
            name = _text(_short(evidence.titles.get(paper, paper)))
            cells = [f'<a href="{home}">{_text(claim.statement)}</a>', name, ", ".join(claim.levels), _text(why)]
            rows.append(f'<tr role="row">{_cells(heads, cells)}</tr>')
    every = [claim for file in FILES for claim in evidence.claims.get(file, ()) if _unjudged(claim) != OBSERVED]
    reached = {v.level for claim in every for v in evidence.of(claim).values()}
    never = [f"**{level}** ({words})" for level, words in LEVELS.items() if level not in reached]
    used = {name for record in evidence.records.values() for name in record["meta"]["datasets"]}
    unused = sorted(set(evidence.datasets) - used)
    lines = ["# What was not run", "", f"{len(rows)} of {len(every)} claims and audits were judged on no data.", ""]
    if never:
        lines += [f"No run of this book reaches level {' or '.join(never)}.", ""]
    lines += _table(heads, rows, "Claims that no run judges") if rows else []
    if unused:
        lines += [
            "## Data that no run shown here used",
            "",
            "Each has a script in `data_scripts/`; most need an account or an agreement with their owners.",
            "",
            ", ".join(f"`{name}`" for name in unused) + ".",
            "",
        ]
    return "\n".join(lines)


def why_not_run(evidence: Evidence, claim: Claim) -> str:
    """Say why a claim has no verdict: no page, no data of its level, no contrast, or an arm or test that no run has."""
    if _unjudged(claim) == OBSERVED:
        return "to be seen where it is quoted from; no run judges it"
    pages = evidence.pages(claim.paper)
    if not pages:
        return "no page of this paper has been published yet"
    reached = {v.level for page in pages for results in evidence.judged[page].values() for v in results}
    if not reached & set(claim.levels):
        needed = " or ".join(f"level {level} ({LEVELS[level]})" for level in claim.levels)
        return f"it needs {needed}, and the runs reach {', '.join(sorted(reached))}"
    if claim.contrast is None:
        return "no experiment of this book tests it"
    runs = [evidence.records[key] for page in pages for key in evidence.stale.get(page, ())]
    for arm in (claim.contrast.a, claim.contrast.b):
        if arm and not any(run["arm"] == arm.arm for run in runs):
            return f"no published run has the arm {arm.arm}"
        tests = {test["name"] for run in runs if arm and run["arm"] == arm.arm for test in run["experiment"]["tests"]}
        if arm and arm.test not in tests:
            return f"no published run of the arm {arm.arm} has the test {arm.test}"
    return f"no case of a published run has the score {claim.contrast.metric} that it is about"
