"""What the first cells of a chapter need: checked parameters, and numbers and figures that carry their provenance."""

import ast
import difflib
import html
import inspect
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, get_args

from lib import figures
from lib.facts import Fact, Said, table_digest
from lib.facts import fact as fact  # chapters say chapter.fact, chapter.glue, chapter.say
from lib.statistics import shown

if TYPE_CHECKING:
    from IPython.display import Markdown

    from lib.ledger import Verdict
    from lib.runs import Record
    from lib.statistics import Interval

Rule = type | UnionType | tuple
ROOT = Path(__file__).resolve().parents[1]
RUNS_PAGE = "../what_was_run.html"  # as seen from a chapter's page
PLACES = ("data", "runs", "jobs")  # parameters that say where and how fast, and change no number
_CHECKED = "_chapter_parameters_checked"
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))  # what papermill can inject


def setup() -> None:
    """Prepare the session: the book's figure style, quiet libraries, and the repository as working folder.

    The folder changes only where a notebook was started inside the repository (JupyterLab starts it in
    `notebooks/`), so that a path given to papermill elsewhere keeps its meaning.
    """
    if Path.cwd().is_relative_to(ROOT):
        os.chdir(ROOT)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    # A page shows what is said and not where this machine keeps the code that says it.
    warnings.formatwarning = lambda message, category, *place, **more: f"{category.__name__}: {message}\n"
    figures.style()


def parameters(namespace: dict[str, Any], **rules: Rule) -> SimpleNamespace:
    """Check the values of a notebook's parameters cell, and return them.

    A rule is a tuple of allowed values, a type, or `(type, check)` where `check(value)` is true for a good value.
    Raises ValueError for a bad value, and for a name that is no parameter: papermill only warns of a mistyped `-p`.
    """
    known = ", ".join(f"{name} ({_expected(rule)})" for name, rule in rules.items())
    if not namespace.get(_CHECKED):  # later in an interactive session the notebook's own variables are there too
        unknown = [
            name
            for name, value in namespace.items()
            if name not in rules and not name.startswith("_") and name not in ("In", "Out") and type(value) in _PLAIN
        ]
        if unknown:
            raise ValueError(f"unknown parameter {unknown[0]!r}{_nearest(unknown[0], rules)}; valid are: {known}.")
    for name, rule in rules.items():
        if name not in namespace:
            raise ValueError(f"parameter {name!r} is not set: give it a value in the cell tagged 'parameters'.")
        if not _accepts(rule, namespace[name]):
            nearest = _nearest(namespace[name], rule) if _is_choice(rule) else ""
            raise ValueError(
                f"parameter {name} = {namespace[name]!r} is not valid: expected {_expected(rule)}{nearest}; "
                f"the parameters are: {known}."
            )
    namespace[_CHECKED] = True
    return SimpleNamespace(**{name: namespace[name] for name in rules})


def _is_choice(rule: Rule) -> bool:
    return isinstance(rule, tuple) and not (len(rule) == 2 and callable(rule[1]))


def _accepts(rule: Rule, value: Any) -> bool:
    if _is_choice(rule):
        return any(value == allowed and type(value) is type(allowed) for allowed in rule)
    kind, check = rule if isinstance(rule, tuple) else (rule, None)
    kinds = get_args(kind) or (kind,)
    if float in kinds:
        kinds += (int,)
    if isinstance(value, bool) and bool not in kinds:  # to isinstance, True is an int
        return False
    return isinstance(value, kinds) and (check is None or bool(check(value)))


def _expected(rule: Rule) -> str:
    if _is_choice(rule):
        return " | ".join(map(str, rule))
    if isinstance(rule, tuple):
        kind, check = rule
        return f"{_expected(kind)} {check.__doc__ or 'in its range'}"
    return getattr(rule, "__name__", str(rule))


def _nearest(given: Any, names: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(given), [str(name) for name in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def command(name: str, chosen: SimpleNamespace) -> str:
    """Write the papermill command that repeats this run: the profile, and what differs from the notebook's defaults."""
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    assigned = [node for node in ast.parse("".join(tagged["source"])).body if isinstance(node, ast.Assign)]
    defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    given = [
        f"-p {key} {value}"
        for key, value in vars(chosen).items()
        if key == "profile" or (key not in PLACES and value != defaults.get(key))
    ]
    return " ".join([f"papermill notebooks/{name}.ipynb out.ipynb", *given])


def source(thing: Any) -> "Markdown":
    """Show a class or function as it stands in `lib`, with the file and line where it does."""
    from IPython.display import Markdown

    lines, first = inspect.getsourcelines(thing)
    where = Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)
    return Markdown(f"`{where}`, line {first}\n\n```python\n{''.join(lines)}```")


def book(name: str) -> Path:
    """Find a file of the book, such as claims.yml."""
    return ROOT / "book" / name


class Strip:
    """HTML whose display metadata names the run records and weights behind it, for `book/build.py publish`.

    arms: (key, arm) pairs, since a chapter may know a run by another name than the one that it was made under;
    tables: key -> the hash of its per-case table, since what is drawn from one holds for no other.
    """

    def __init__(self, text: str, plain: str, keys: Sequence[str], **more: Any):
        self._bundle = {"text/html": text, "text/plain": plain}
        self._metadata = {"prompt_to_mask": {"records": list(keys)} | more}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return self._bundle, self._metadata


def provenance(records: "Record | Sequence[Record]", command: str) -> Strip:
    """Say which runs made the figure above: keys, commit, device, seconds, memory, and the papermill command."""
    records = list(records) if isinstance(records, Sequence) else [records]
    if not records:
        raise ValueError("provenance needs at least one run record: give the records that the figure shows.")
    metas = [record.meta for record in records]
    facts = [
        "1 run" if len(records) == 1 else f"{len(records)} runs",
        "commit " + ", ".join(sorted({meta["commit"][:7] + "+" * meta["dirty"] for meta in metas})),
        ", ".join(sorted({str(meta["device"]) for meta in metas})),
        _duration(sum(meta["seconds"] for meta in metas)),
        # of a process that trained before, only what it grew by
        f"memory gained {max(meta['peak_memory_mb'] for meta in metas):,.0f} MB",
    ]
    keys = list(dict.fromkeys(record.key for record in records))
    links = [f'<a href="{RUNS_PAGE}#run-{key[:12]}">{key[:8]}</a>' for key in keys]
    shown = ", ".join(links) if len(links) <= 4 else f"<details><summary>keys</summary>{', '.join(links)}</details>"
    return Strip(
        '<div class="provenance" style="font-size:.8em;opacity:.85;padding-left:.6em">'
        f"{' · '.join(map(html.escape, facts))} · {shown} <br><code>{html.escape(command)}</code></div>",
        f"{' · '.join(facts)} · {command}",
        keys,
        arms=[list(pair) for pair in dict.fromkeys((record.key, record.arm) for record in records)],
        tables={record.key: table_digest(record.folder) for record in records},
    )


def weights(record: "Record") -> Strip:
    """Name the weights file that the explorer above uses, so that `book/build.py publish` keeps it with the page."""
    name, size = record.weights.name, record.weights.stat().st_size
    facts = f"{name[:12]}….safetensors, {size / 1e6:.1f} MB, sha256 {record.meta['weights_sha256'][:12]}…"
    where = "kept as runs/weights/ after a run and as book/published/weights/ with a published page"
    text = f'<div class="provenance" style="font-size:.8em;opacity:.85">weights: <code>{facts}</code> ({where})</div>'
    return Strip(text, facts, [record.key], weights=[record.meta["fit_key"]])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def verdict_table(results: "Sequence[Verdict]") -> Strip:
    """Lay out verdicts, raw and after Holm: claim, paper's value, data level, effect, and on how much it rests."""
    heads = ("claim", "verdict", "level", "effect, 95 % interval", "measured on")
    rows = []
    for v in results:
        claim = f"{html.escape(v.claim.statement)}<br><small>paper: {html.escape(v.claim.paper_value)}</small>"
        mean, _, rest = html.escape(v.effect_text).replace("\n", "<br>").partition(" ")
        badge = figures.verdict_badge(v.verdict) + (f"<br><small>after Holm: {v.corrected}</small>" if v.p_holm else "")
        amount = v.amount.replace("\n", "<br>")
        cells = (claim, badge, v.level, f"<b>{mean}</b> {rest}" if mean else "", amount)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    top = "".join(f"<th>{head}</th>" for head in heads)
    text = f'<table class="dataframe verdicts"><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    plain = "\n".join(f"{v.claim.id} ({v.level}): {v.verdict}" for v in results)
    return Strip(text, plain, list(dict.fromkeys(key for v in results for key in v.keys)))


def glue(name: str, value: "Fact | Interval | tuple[float, float, float] | float | int | str", digits: int = 2) -> None:
    """Give a number to the prose, where {glue:text}`name` prints it; an interval (mean, low, high) shows its ends."""
    from myst_nb import glue as paste  # only the book's extras have it

    facts = [value] if isinstance(value, Fact) else []
    paste(name, Said(name, shown(value, digits), facts), display=False)


def say(name: str, text: str, facts: "Sequence[Fact]" = ()) -> None:
    """Give a computed sentence to the prose, where {glue:md}`name` prints it as the Markdown that it is.

    facts: what `fact` measured and the text says; raises ValueError for one that it does not say.
    """
    from myst_nb import glue as paste

    paste(name, Said(name, text, facts, markdown=True), display=False)
