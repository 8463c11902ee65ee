"""What code does, as a hash: part of a run's key, so that no number outlives the code that made it.

Layout, comments and docstrings do not count. A registry does not count either: the entry that a run uses is in its key.
"""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parent.parent
REGISTRIES = ("MODELS", "LOSSES", "BACKBONES")
APART = ("lib.wording",)  # counts only for runs that rewrite a prompt, which name it
WHOLE, IMPORTED = "", "<import>"  # parts of a module: all of it, or only what runs when it is imported


class _Statement(NamedTuple):
    """A statement of a module: the names that it defines (none: it runs whoever imports the module), what it does, and
    what of `lib` it names, as (module, part) or, of an imported module, as (package, module, part).
    """

    defines: frozenset[str]
    does: list
    names: tuple[tuple[str, ...], ...]


@cache
def sources_hash(roots: tuple[str, ...], home: Path = HOME) -> str:
    """Hash what the roots do, with all of `lib` that they reach; their wording does not count."""
    return hashlib.sha256(json.dumps(sources(roots, home), sort_keys=True).encode()).hexdigest()


def sources(roots: Sequence[str], home: Path = HOME) -> dict[str, list]:
    """Write down what modules ("lib.data") and parts of modules ("lib.models.duplus:build") do, by module.

    What they import counts by part as well, so that a change of one paper's model is none of another that shares a
    block with it; of a package on the way, what it runs when it is imported.
    """

    def read(module: str) -> list[_Statement]:
        path = home.joinpath(*module.split("."))
        is_package = path.is_dir()
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        package = module if is_package else module.rpartition(".")[0]
        return _statements(path.read_text(encoding="utf-8"), module, package) if path.is_file() else []

    waiting, seen, found = [root.partition(":")[::2] for root in roots], set(), {}
    while waiting:
        module, part = waiting.pop()
        if (module, part) in seen or not (statements := read(module)):
            continue
        seen.add((module, part))
        taken = found.setdefault(module, {})
        for number, statement in enumerate(statements):
            passed_on = not statement.does
            if part in statement.defines or not passed_on and (part == WHOLE or not statement.defines):
                taken[number] = statement.does
                for package, *inner in statement.names:
                    if len(inner) == 2:  # of a module, if it is one: else of what the package defines
                        whole = f"{package}.{inner[0]}"
                        package, inner = (whole, inner[1:]) if read(whole) else (package, inner[:1])
                    if package not in APART:
                        waiting.append((package, *inner))
        above = module.split(".")[:-1]
        waiting += [(".".join(above[: i + 1]), IMPORTED) for i in range(len(above))]
    return {module: [taken[number] for number in sorted(taken)] for module, taken in found.items()}


@lru_cache(maxsize=512)
def _statements(text: str, module: str, package: str) -> list[_Statement]:
    """Take a source apart; what an import makes known is part of what the statements mean that use it."""
    body = [node for node in ast.parse(text).body if _counts(node)]
    bound: dict[str, tuple[str, ...]] = {}
    for node in body:
        bound |= _bindings(node, package)
    statements = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    defined = {name for node in statements for name in _defines(node)}
    # A name may be asked for where it is only passed on.
    found = [_Statement(frozenset([name]), [], ((*target, WHOLE),)) for name, target in bound.items() if _ours(target)]
    for node in statements:
        local = {name: target for inner in ast.walk(node) for name, target in _bindings(inner, package).items()}
        known, used, names = bound | local, {}, set()
        parts = {id(inner.value): inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
        for inner in ast.walk(node):
            name = getattr(inner, "id", "") if isinstance(inner, ast.Name) else ""
            if name in known:
                used[name] = known[name]
                names.add((*known[name], parts.get(id(inner), WHOLE) if len(known[name]) > 1 else WHOLE))
            elif name in defined:
                names.add((module, name))
        names |= {(*target, WHOLE) for target in local.values()}
        found.append(_Statement(_defines(node), [_meaning(node), sorted(used.items())], tuple(filter(_ours, names))))
    return found


def _ours(name: tuple[str, ...]) -> bool:
    return name[0].partition(".")[0] == "lib"


def _bindings(node: ast.AST, package: str) -> dict[str, tuple[str, ...]]:
    """What an import makes known: name -> (module,) or (package, name)."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.partition(".")[0]: (alias.name,) for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return {}
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    source = ".".join([*above, *([node.module] if node.module else [])])
    return {alias.asname or alias.name: (source, alias.name) for alias in node.names}


def _defines(node: ast.AST) -> frozenset[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return frozenset([node.name])
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return frozenset()
    places = [place for target in targets for place in getattr(target, "elts", [target])]
    return frozenset(place.id for place in places if isinstance(place, ast.Name))


@cache
def step_source(step: Callable) -> str:
    """Write down what one function does, where the file that it stands in is more than that."""
    return json.dumps(_meaning(ast.parse(inspect.getsource(step))))


def steps(home: Path = HOME) -> dict[str, list]:
    """Write down what each function and class of `lib.runs` does, by name."""
    tree = ast.parse((home / "lib/runs.py").read_text(encoding="utf-8"))
    return {node.name: _meaning(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _meaning(node: object) -> object:
    """Syntax as nested lists that layout, comments and docstrings do not change, and on which Python versions agree."""
    if isinstance(node, list):
        return [_meaning(item) for item in node if _counts(item)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *([name, _meaning(value)] for name, value in fields if name != "ctx")]


def _counts(node: object) -> bool:
    """Whether a statement can change a number: a docstring cannot, nor can a new entry of a registry."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return not any(isinstance(target, ast.Name) and target.id in REGISTRIES for target in targets)
