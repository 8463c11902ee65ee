"""Which run records would have another key today, and why: settings, code, pins or data that changed since.

Nothing is run and no model is loaded: the sources of a record's commit are read from the repository's history.
"""

import ast
import json
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from lib.files import extract
from lib.keys import APART, HOME, sources, steps

# As lib.runs counts them.
ALWAYS = ("lib.data", "lib.text", "lib.training", "lib.models:build", "lib.losses:loss", "lib.evaluation")
UNKNOWN = "the commit is not in this copy's history, so what changed since cannot be told"


def changes(
    records: Sequence[Mapping[str, Any]],
    data: Path | None = None,
    home: Path = HOME,
    together: Sequence[Collection[str]] = (),
) -> dict[str, list[str]]:
    """Say what has changed since each record (as in record.json) was made: key -> reasons, none if it is current.

    `data` is a folder of datasets, of which those that are there are compared with the record's; `together` are the
    keys that one page shows, among which a run finds those that it was built on (none given: among all).
    """
    found: dict[str, list[str]] = {}
    commits = dict.fromkeys(record["meta"]["commit"] for record in records)
    for commit in commits:
        with _checked_out(commit, home) as then:
            code = cache(partial(_code, then, home))
            for record in records:
                if record["meta"]["commit"] == commit:
                    found[record["key"]] = [
                        *_settings(record["experiment"], home),
                        *(["made with changes that were not committed"] if record["meta"]["dirty"] else []),
                        *(code(*_used(record["experiment"], home)) if then else [UNKNOWN]),
                        *_data(record["meta"], data),
                    ]
    return _with_parts(records, found, together or [set(found)])


def _with_parts(
    records: Sequence[Mapping[str, Any]], found: dict[str, list[str]], together: Sequence[Collection[str]]
) -> dict[str, list[str]]:
    """Add that a run was built on another one that is stale, at any distance: its key holds the other's."""
    built_on = {record["key"]: _built_on(record, records, together) for record in records}
    waiting = [key for key, parts in built_on.items() if parts and not found[key]]
    while reached := {
        key: stale
        for key in waiting
        if (stale := sorted(arm for arm, keys in built_on[key].items() if any(found[part] for part in keys)))
    }:
        for key, stale in reached.items():
            found[key].append(f"built on {', '.join(stale)}")
        waiting = [key for key in waiting if key not in reached]
    return found


def _built_on(
    record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], together: Sequence[Collection[str]]
) -> dict[str, list[str]]:
    """The runs that a run may have been built on: arm -> keys, of which a record names the arm alone.

    They stand on one of its pages, and those of its own seed and data come first: members of an ensemble have others.
    """
    settings = record["experiment"]
    arms = {*(settings.get("parts") or {}).values(), (settings.get("pseudo") or {}).get("experiment")} - {None}
    near = set().union(*(page for page in together if record["key"] in page)) if arms else ()
    found = {}
    for arm in arms:
        named = [other for other in records if other["arm"] == arm and other["key"] in near]
        for same in ("seed", "train"):
            alike = [other for other in named if other["experiment"].get(same) == settings.get(same)]
            named = alike or named
        found[arm] = [other["key"] for other in named]
    return found


@contextmanager
def _checked_out(commit: str, home: Path) -> Iterator[Path | None]:
    """The library and the pins as they were, in a folder that goes away again; None where the history lacks them."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "then.tar"
        words = ["git", "archive", "--output", str(archive), commit, "lib", "requirements.lock"]
        done = subprocess.run(words, cwd=home, capture_output=True, check=False)
        if done.returncode:
            yield None
            return
        yield extract(archive, Path(folder) / "then")


def _settings(experiment: Mapping[str, Any], home: Path) -> list[str]:
    """Settings that were added or dropped since: an experiment's key holds all of them, with their defaults."""
    stored = {
        "Experiment": {*experiment, "arm"},
        "Test": set().union(*experiment["tests"]) if experiment["tests"] else None,
        "Budget": set(experiment.get("budget") or ()) or None,
        "PromptPolicy": set(experiment.get("prompts") or ()) or None,
    }
    places = {"Experiment": "runs", "Test": "runs", "Budget": "training", "PromptPolicy": "text"}
    differing = [
        name
        for kind, names in stored.items()
        if names is not None
        for name in _fields((home / f"lib/{places[kind]}.py").read_text(encoding="utf-8"), kind)
        if name not in names
    ]
    return [f"settings since: {', '.join(dict.fromkeys(differing))}"] if differing else []


@cache
def _fields(source: str, name: str) -> tuple[str, ...]:
    kind = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    return tuple(node.target.id for node in kind.body if isinstance(node, ast.AnnAssign))


def _used(experiment: Mapping[str, Any], home: Path) -> tuple[str | None, ...]:
    """The modules and parts of modules that a key counts; None for a model or loss that is no longer there."""

    def entry(package: str, table: str, name: str) -> str | None:
        return _registry((home / f"lib/{package}.py").read_text(encoding="utf-8"), table).get(name.partition("@")[0])

    model = entry("models/__init__", "MODELS", experiment["model"])
    loss = entry("losses/__init__", "LOSSES", experiment["loss"])
    rewrites = _registry((home / "lib/wording.py").read_text(encoding="utf-8"), "REWRITES")
    looks = [experiment, *experiment["tests"]]
    reworded = any(look["prompts"]["perturbation"] in rewrites for look in looks if "prompts" in look)
    return *ALWAYS, *(APART if reworded else ()), model, loss


@cache
def _registry(source: str, name: str) -> dict[str, str | None]:
    for node in ast.parse(source).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {key.value: getattr(value, "value", None) for key, value in pairs}
    raise ValueError(f"There is no table {name} in this source: lib.staleness reads registries as they are written.")


def _code(then: Path, home: Path, *modules: str | None) -> list[str]:
    if None in modules:
        return ["code: its model or loss is no longer in the library"]
    before, now = sources(modules, then), sources(modules, home)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    before, now = steps(then), steps(home)
    if any(before.get(name) != now.get(name) for name in _counted((home / "lib/runs.py").read_text(encoding="utf-8"))):
        changed.append("lib.runs")
    locks = {(folder / "requirements.lock").read_bytes() for folder in (then, home)}
    return [
        *([f"code: {', '.join(name.removeprefix('lib.') for name in changed)}"] if changed else []),
        *(["pins of requirements.lock"] if len(locks) > 1 else []),
    ]


@cache
def _counted(source: str) -> tuple[str, ...]:
    """The functions of lib.runs whose source is part of a key: those that `_key` puts into `steps`."""
    key = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "_key")
    named = []
    for node in ast.walk(key):
        target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
        if isinstance(node, ast.Assign | ast.AugAssign) and isinstance(target, ast.Name) and target.id == "steps":
            named += [part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)]
    return tuple(named)


def _data(meta: Mapping[str, Any], data: Path | None) -> list[str]:
    others = []
    for name, known in meta["datasets"].items():
        card = data / name / "card.json" if data else None
        if card and card.is_file() and "fingerprint" in known:
            now = json.loads(card.read_text(encoding="utf-8")).get("fingerprint")
            if now != known["fingerprint"]:
                others.append(name)
    return [f"data: {', '.join(others)}"] if others else []
