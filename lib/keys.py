"""What code does, as a hash: part of a run's key, so that no number outlives the code that made it.

Layout, comments and docstrings do not count. A registry does not count either: the entry that a run uses is in its key.
"""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
REGISTRIES = ("MODELS", "LOSSES", "BACKBONES")
APART = ("lib.wording",)  # counts only for runs that rewrite a prompt, which name it


@cache
def sources_hash(modules: tuple[str, ...], home: Path = HOME) -> str:
    """Hash what the named `lib` modules do, with all `lib` modules that they import; their wording does not count."""
    return hashlib.sha256(json.dumps(sources(modules, home), sort_keys=True).encode()).hexdigest()


def sources(modules: tuple[str, ...], home: Path = HOME) -> dict[str, list]:
    """Write down what the named modules and all that they import do, by module."""
    waiting, seen = list(modules), {}
    while waiting:
        name = waiting.pop()
        path = home.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # `from lib.text import Prompts` might name a module lib.text.Prompts, of which there is no file.
        if name in seen or not path.is_file():
            continue
        package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
        seen[name], imported = _parsed(path.read_text(encoding="utf-8"), tuple(package))
        waiting += imported
    return seen


@lru_cache(maxsize=512)
def _parsed(text: str, package: tuple[str, ...]) -> tuple[list, list[str]]:
    """What a source does, and the modules of `lib` that it names."""
    tree = ast.parse(text)
    imported = []
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found = [source, *(f"{source}.{name}" for name in found)]
        for name in found:
            parts = name.split(".")  # importing a.b.c runs the packages a and a.b
            packages = [".".join(parts[: i + 1]) for i in range(len(parts)) if parts[0] == "lib"]
            imported += [found for found in packages if found not in APART]
    return _meaning(tree), imported


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
