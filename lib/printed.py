"""What the published pages print, read back and held against the run records: `python -m lib.ledger verify`.

A page is an executed notebook. Its verdict tables are judged again, and so are the facts that its sentences carry, and
the numbers that its prose takes from `ledger.effect`, from the call as it stands in the page's own cell. Numbers of
other origin (figures, tables that a cell lays out itself, timings) need the notebook to run: they are counted, and held
by the seal of the text that says them and by the hash of the per-case tables that the page was made from.
"""

import argparse
import ast
import json
import operator
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd

from lib.facts import Fact, seal, table_digest
from lib.ledger import Claim, Verdict, collect, copy_of, effect, inside, load_claims, verdicts
from lib.records import Record, load_record
from lib.statistics import shown

FILES = ("claims.yml", "audit.yml")
BOOK = Path(__file__).resolve().parents[1] / "book"
FOUND = ("In one minute", "What it means", "What this cannot say")  # rooms that say what was found
COUNTS = {
    "str(sum((v.verdict == 'supported' for v in results)))": lambda v: v.verdict == "supported",
    "str(sum((v.verdict != 'not run' for v in results)))": lambda v: v.verdict != "not run",
}
COMPARED = {ast.Eq: operator.eq, ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le}
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.]*\d)(?! *(?:mm|s|min|h|GB|MB)\b)")  # a setting or cost is no result
WHOLE = re.compile(r"(?<![\w.,])\d+(?= ?%(?! intervals?\b)| points?\b| \w+ points?\b)")  # 87 %, 14 points of ...
OF = re.compile(r"(?<![\w.,])\d+ (?:out )?of (?:the |its |all )?\d+\b")  # 3 of 5
JUDGED = re.compile(
    r"\b(?:is|are|was|were|be|stays?|remains?|reads?|as) \W{0,2}(?:not |still |clearly )?\W{0,2}"
    r"(?:supported|unsupported|inconclusive|confirmed|refuted)\b"
    # "The claim holds." and "it fails on real images", but not "the table holds numbers" or "what can fail"
    r"|(?<!can )(?<!may )(?<!could )(?<!would )(?<!might )\b(?:holds?|held|fails?|failed)"
    r"(?=[.,;:!)]| (?:on|for|at|up|here|there|true|everywhere|nowhere)\b)",
    re.IGNORECASE,
)
NUMBER = re.compile(r"\d")
# What is no prose: code, targets of links, tags, roles that print what a run gave.
NO_PROSE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]+>", re.DOTALL)


@dataclass(frozen=True)
class Disagreement:
    """One thing that a page says and its records do not."""

    page: str
    what: str
    printed: str
    found: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = [key[:12] for key in self.keys]
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        made = f" (records {', '.join(named[:4])}{more})" if named else ""
        return f"{self.page}: {self.what}: printed {self.printed!r}, found {self.found!r}{made}"


@dataclass(frozen=True)
class Text:
    """What a cell gave to the prose; no seal: it was given before there were any."""

    text: str
    facts: Sequence[Mapping[str, Any]] = ()
    seal: str = ""


@dataclass(frozen=True)
class Page:
    """An executed notebook: what it printed, and the cells that say how."""

    name: str
    title: str
    keys: tuple[str, ...]  # of the run records that it shows
    arms: Mapping[str, Sequence[str]]  # key -> the names that its runs have there; none said: the record's own
    verdicts: Mapping[tuple[str, str], Mapping[str, str]]  # (claim, level) -> verdict, effect, amount
    texts: Mapping[str, Text]  # name -> what the prose shows
    calls: Mapping[str, Sequence[tuple[ast.expr | None, int]]]  # name -> the ways in which a cell may make it, digits
    tables: Mapping[str, Sequence[ast.expr]]  # name -> what the cells assign to it
    digests: Mapping[str, str]  # key -> hash of the per-case table that the page was made from
    found: str  # the prose of the rooms that say what was found

    def paper(self, papers: Sequence[str]) -> str | None:
        """Whose claims it judges: the paper that its name is, or begins with."""
        fitting = [paper for paper in papers if self.name == paper or self.name.startswith(f"{paper}-")]
        return max(fitting, key=len, default=None)


@dataclass
class Report:
    """What a check of the pages found."""

    disagreements: list[Disagreement] = field(default_factory=list)
    pages: int = 0
    records: int = 0
    verdicts: int = 0
    numbers: int = 0
    sealed: int = 0
    unchecked: int = 0


# --- reading a page --------------------------------------------------------------------------------------------------


def record_keys(notebook: Mapping[str, Any], what: str = "records") -> list[str]:
    """List the keys of the run "records" or "weights" that a notebook's provenance strips name."""
    keys: dict[str, None] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            keys.update(dict.fromkeys(output.get("metadata", {}).get("prompt_to_mask", {}).get(what, ())))
    return list(keys)


def read_page(path: Path, name: str | None = None) -> Page:
    """Read an executed notebook."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    shown_verdicts, texts, calls, arms, assigned, digests = {}, {}, {}, {}, {}, {}
    markdown = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if "text" in kind}
            if 'class="dataframe verdicts"' in data.get("text/html", ""):
                shown_verdicts |= _verdict_rows(data["text/html"], data["text/plain"])
            own = output.get("metadata", {}).get("prompt_to_mask", {})
            digests |= own.get("tables", {})
            for key, arm in own.get("arms", ()):
                arms.setdefault(key, dict.fromkeys([arm]))[arm] = None
            if given := output.get("metadata", {}).get("scrapbook"):
                kinds = (f"{given['mime_prefix']}text/{kind}" for kind in ("markdown", "plain"))
                text, said = next((data[kind] for kind in kinds if kind in data), ""), own.get("said", {})
                texts[given["name"]] = Text(text, said.get("facts", ()), said.get("sha256", ""))
        if cell["cell_type"] == "code":
            tree = _parsed("".join(cell["source"]))
            for what, value, places in _glued(tree):
                calls.setdefault(what, []).extend((way, places) for way in _ways(value))
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    assigned.setdefault(node.targets[0].id, []).append(node.value)
    title = next((text for source in markdown for text in re.findall(r"^# +(.*)$", source, re.MULTILINE)), path.stem)
    rooms = re.split(r"^## +", "\n\n".join(markdown), flags=re.MULTILINE)
    found = "\n\n".join(room for room in rooms if any(name in room.partition("\n")[0] for name in FOUND))
    keys = tuple(record_keys(notebook))
    named = {key: list(names) for key, names in arms.items()}
    return Page(name or path.stem, title, keys, named, shown_verdicts, texts, calls, assigned, digests, found)


class _Cells(HTMLParser):
    """The text of each cell of a table's body, row by row, where <br> ends a line."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "br" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def _verdict_rows(table: str, plain: str) -> dict[tuple[str, str], dict[str, str]]:
    """Read a verdict table: its plain form names the claims, its HTML holds effects, in the same order."""
    named = [re.match(r"(\S+) \((\w)\): ", line) for line in plain.splitlines()]
    rows = [row for row in _Cells(table).rows if row]
    found = {}
    for claim, row in zip(filter(None, named), rows, strict=True):
        badge, _, holm = row[1].partition("\nafter Holm: ")
        cells = {"verdict": badge.partition(" ")[2], "effect": row[3], "amount": row[4]}
        found[claim[1], claim[2]] = cells | ({"after Holm": holm} if holm else {})
    return found


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # a cell with a magic command
        return ast.Module([], [])


def _glued(tree: ast.Module) -> Iterator[tuple[str, ast.expr, int]]:
    """Find the calls of chapter.glue with a name that is written out: name, value, digits."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "chapter.glue" and len(node.args) > 1:
            name, value, *places = node.args
            if isinstance(name, ast.Constant):
                yield name.value, value, places[0].value if places and isinstance(places[0], ast.Constant) else 2


def _ways(value: ast.expr) -> list[ast.expr]:
    return [*_ways(value.body), *_ways(value.orelse)] if isinstance(value, ast.IfExp) else [value]


# --- computing again -------------------------------------------------------------------------------------------------


def load_shown(page: Page, folders: Sequence[Path]) -> tuple[list[Record], list[Disagreement]]:
    """Load the records that a page shows from the first folder that has each, and say which are missing or damaged."""
    records, wrong = [], []
    for key in page.keys:
        folder = next((place / key for place in folders if (place / key / "record.json").is_file()), None)
        try:
            if folder is None:
                raise ValueError("no record of this key")
            record = load_record(folder)
            if record.key != key:
                raise ValueError(f"a record of the key {record.key[:12]}")
            if page.digests.get(key) not in (None, table_digest(folder)):
                changed = "a table that was changed since; publish the page again"
                wrong.append(Disagreement(page.name, "the per-case table of a run", key[:12], changed))
            records += [replace(record, arm=arm) for arm in page.arms.get(key, [record.arm])]
        except ValueError as error:
            wrong.append(Disagreement(page.name, "a run record", key[:12], str(error)))
    return records, wrong


def judge_page(
    page: Page, records: Sequence[Record], claims: Mapping[str, Sequence[Claim]]
) -> dict[str, list[Verdict]]:
    """Judge the claims of a page's paper as the page does, from its records: claims.yml or audit.yml -> verdicts."""
    paper = page.paper(sorted({claim.paper for rows in claims.values() for claim in rows}))
    if paper is None or not records:
        return {}
    return {file: verdicts([c for c in rows if c.paper == paper], records) for file, rows in claims.items()}


def compare(page: Page, records: Sequence[Record], judged: Mapping[str, Sequence[Verdict]], report: Report) -> None:
    """Hold what a page prints against its records, and add what was found to the report."""
    by_claim = {(v.claim.id, v.level): v for results in judged.values() for v in results}
    for (claim, level), v in by_claim.items():
        what, printed = f"claim {claim} at level {level}", page.verdicts.get((claim, level))
        if printed is None:
            say = Disagreement(page.name, what, "nothing", f"{v.verdict}; publish the page again", v.keys)
            report.disagreements.append(say)
            continue
        now = {"verdict": v.verdict, "effect": v.effect_text, "amount": v.amount, "after Holm": v.corrected}
        report.verdicts += 1
        for part, text in printed.items():
            if text != now[part]:
                lines = (side.replace("\n", " ") for side in (text, now[part]))
                report.disagreements.append(Disagreement(page.name, f"{what}, {part}", *lines, v.keys))
    if judged:
        for claim, level in sorted(set(page.verdicts) - set(by_claim)):
            gone = "no such claim, or no record of that level"
            report.disagreements.append(
                Disagreement(page.name, f"claim {claim} at level {level}", page.verdicts[claim, level]["verdict"], gone)
            )
    compare_texts(page, records, judged, report)


def compare_texts(
    page: Page, records: Sequence[Record], judged: Mapping[str, Sequence[Verdict]], report: Report
) -> None:
    """Hold what the cells gave to the prose against the records, and add what was found to the report."""
    every = collect(records)
    table = inside(every, {name for record in records for name in record.experiment.get("train", ())})
    for name, given in page.texts.items():
        if given.seal:
            report.sealed += 1
            if given.seal != seal(name, given.text, given.facts):
                what = f"the text {name!r} of the prose"
                say = Disagreement(page.name, what, given.text, "another seal: it was edited; publish the page again")
                report.disagreements.append(say)
        known = [_fact_again(Fact(**one), given.text, every) for one in given.facts]
        report.numbers += len(known)
        for one, again in zip(given.facts, known, strict=True):
            if again != one["text"]:
                what = f"{one['what']} in the text {name!r} of the prose"
                report.disagreements.append(Disagreement(page.name, what, one["text"], again, page.keys))
        if known:
            report.unchecked += bool(NUMBER.search(_without(given.text, given.facts)))
        else:
            _compare_call(name, given.text, page, table, judged, report)


def _fact_again(one: Fact, text: str, table: pd.DataFrame) -> str:
    if one.text not in text:
        return f"not in the text {text!r}"
    try:
        return one.again(table)
    except (KeyError, ValueError) as error:
        return f"nothing ({error})"


def _without(text: str, facts: Sequence[Mapping[str, Any]]) -> str:
    """What a sentence says beside its facts, the longest of which are taken out first."""
    for one in sorted((fact["text"] for fact in facts), key=len, reverse=True):
        text = text.replace(one, " ")
    return NO_PROSE.sub(" ", text)


def _compare_call(
    name: str,
    text: str,
    page: Page,
    table: pd.DataFrame,
    judged: Mapping[str, Sequence[Verdict]],
    report: Report,
) -> None:
    """Hold a number against the calls of chapter.glue by which a cell may have made it.

    A constant, such as "not run", is good only where no other branch has something to say.
    """
    found = {"constant": [], "computed": [], "failed": [], "unknown": []}
    for way, digits in page.calls.get(name, ()):
        kind, again = _again(way, table, page, judged, digits)
        found[kind].append(again)
    good = found["computed"] or ([] if found["unknown"] else found["constant"])
    if text in good:
        report.numbers += 1
    elif found["unknown"] or not any(found.values()):
        report.unchecked += 1
    else:
        report.numbers += 1
        said = " or ".join(good or found["failed"])
        what = f"the number {name!r} in the prose"
        report.disagreements.append(Disagreement(page.name, what, text, said, page.keys))


def _again(
    value: ast.expr, table: pd.DataFrame, page: Page, judged: Mapping[str, Sequence[Verdict]], digits: int
) -> tuple[str, str]:
    """Compute what chapter.glue was given: how that went, and its text.

    "unknown" is what needs the notebook to run, "failed" what the records do not hold, "constant" what needs neither.
    """
    if isinstance(value, ast.Constant):
        return "constant", shown(value.value, digits)
    text = ast.unparse(value)
    if text in COUNTS and FILES[0] in judged:
        return "computed", str(sum(map(COUNTS[text], judged[FILES[0]])))
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "ledger.effect" and len(value.args) > 2):
        return "unknown", ""
    try:
        metric, *sides = (ast.literal_eval(part) for part in value.args[1:])
        rows = _rows(value.args[0], table, page)
    except (KeyError, ValueError):  # built by the cell, as in f"saliency-{name}", or a column that the cell adds
        return "unknown", ""
    try:
        return "computed", shown(effect(rows, metric, *sides), digits)
    except (KeyError, ValueError) as error:
        return "failed", f"nothing ({error})"


def _rows(node: ast.expr, table: pd.DataFrame, page: Page) -> pd.DataFrame:
    """The rows that a cell takes: `table` is what the page collected, others are parts of it, chosen by columns.

    Raises ValueError for what is not written as such a choice.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "copy":
        return _rows(node.func.value, table, page)
    if isinstance(node, ast.Name) and node.id == "table":
        return table
    if isinstance(node, ast.Name) and len(page.tables.get(node.id, ())) == 1:
        return _rows(page.tables[node.id][0], table, page)
    if isinstance(node, ast.Subscript):
        rows = _rows(node.value, table, page)
        return rows[_chosen(node.slice, rows)]
    raise ValueError(f"{ast.unparse(node)} is no part of the page's table")


def _chosen(node: ast.expr, rows: pd.DataFrame) -> pd.Series:
    """Evaluate a condition on columns: comparisons with constants, isin, and `&` of such."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _chosen(node.left, rows) & _chosen(node.right, rows)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return rows[node.slice.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "isin":
        return _chosen(node.func.value, rows).isin(ast.literal_eval(node.args[0]))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        return COMPARED[type(node.ops[0])](_chosen(node.left, rows), ast.literal_eval(node.comparators[0]))
    raise ValueError(f"{ast.unparse(node)} is no condition on columns")


def typed(name: str, text: str, claims: Mapping[str, Sequence[Claim]]) -> list[Disagreement]:
    """List the results and verdicts that a text says by itself: results are glued, and nobody types a verdict.

    A result is a decimal, a whole number of per cent or points, or a count of counts, that no row of claims.yml or
    audit.yml quotes.
    """
    rows = [claim for part in claims.values() for claim in part]
    quoted = {number for row in rows for number in _results(f"{row.statement} {row.paper_value} {row.source}")}
    prose = NO_PROSE.sub(" ", text)
    loose = [number for number in _results(prose) if number not in quoted]
    return [
        *(Disagreement(name, "a typed number", number, "no quotation of a paper in claims.yml") for number in loose),
        *(
            Disagreement(name, "a typed verdict", word[0], "no run behind it; glue it")
            for word in JUDGED.finditer(prose)
        ),
    ]


def _results(text: str) -> list[str]:
    numbers = [f"{float(number):g}" for kind in (DECIMAL, WHOLE) for number in kind.findall(text)]
    return numbers + OF.findall(text)


# --- the check -------------------------------------------------------------------------------------------------------


def verify(book: Path = BOOK) -> Report:
    """Check every published page of a book, and its front page, against the committed records."""
    claims = {file: load_claims(book / file) for file in FILES}
    report = Report()
    report.disagreements += [
        Disagreement("published", copy.name, "other rows", f"those of {file}; run 'python -m lib.ledger copy'")
        for file in FILES
        if (copy := copy_of(book / file)).is_file() and load_claims(copy) != claims[file]
    ]
    front = book / "index.md"
    if front.is_file():
        report.disagreements += typed("index", front.read_text(encoding="utf-8"), claims)
    for path in sorted((book / "published").glob("*.ipynb")):
        check(read_page(path), [book / "published/records"], claims, report)
    return report


def write_copies(book: Path) -> int:
    """Write the rows of claims.yml and audit.yml as JSON beside the published pages; returns the exit status."""
    import yaml

    for file in FILES:
        load_claims(book / file)  # a copy of what cannot be read helps nobody
        rows = yaml.safe_load((book / file).read_text(encoding="utf-8")) or []
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        copy_of(book / file).write_text(f"{text}\n", encoding="utf-8")
        print(f"{copy_of(book / file)}: {len(rows)} rows")
    return 0


def check(page: Page, folders: Sequence[Path], claims: Mapping[str, Sequence[Claim]], report: Report) -> dict:
    """Check one page, add what was found to the report, and return its verdicts by file."""
    records, wrong = load_shown(page, folders)
    judged = judge_page(page, records, claims)
    report.pages, report.records = report.pages + 1, report.records + len(records)
    report.disagreements += [*wrong, *typed(page.name, page.found, claims)]
    compare(page, records, judged, report)
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lib.ledger", description="Check the book against its run records.")
    commands = parser.add_subparsers(dest="command", required=True)
    check_all = commands.add_parser("verify", help="recompute what the published pages print, from their records")
    copy = commands.add_parser("copy", help="write claims.yml and audit.yml as JSON, for readers without PyYAML")
    for command in (check_all, copy):
        command.add_argument("--book", type=Path, default=BOOK, help="the folder with claims.yml and published/")
    given = parser.parse_args(arguments)
    try:
        if given.command == "copy":
            return write_copies(given.book)
        report = verify(given.book)
    except (OSError, ValueError) as error:
        print(f"ledger: {error}", file=sys.stderr)
        return 2
    for one in report.disagreements:
        print(f"DISAGREES {one}")
    print(
        f"{report.pages} pages, {report.records} run records: {report.verdicts} verdicts and {report.numbers} numbers "
        f"of the prose computed again, {report.sealed} texts under their seal, {report.unchecked} need their notebook "
        "to run; "
        f"{len(report.disagreements)} disagreements."
    )
    return 1 if report.disagreements else 0
