"""Which changes of the code a run's key sees."""

from pathlib import Path

import pytest

from lib import keys
from lib.keys import sources_hash

ROOT = Path(__file__).resolve().parents[1]


SOURCES = {
    "lib/__init__.py": "",
    "lib/a.py": 'from lib import b\nfrom .c import thing\n\ndef f(x):\n    """Say."""\n    return b.g(x)  # why\n',
    "lib/b.py": "import lib.d.e\n\ndef g(x):\n    return x + 1\n",
    "lib/c.py": "thing = None\n",
    "lib/d/__init__.py": 'MODELS = {"one": "lib.d.e:one"}\n',
    "lib/d/e.py": "def one(*, key=None, **rest):\n    global x\n    return {**rest}\n",
    "lib/apart.py": "x = 1\n",
}


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        (
            "lib/a.py",
            'from lib import b\nfrom .c import thing\ndef f(x):\n    """Tell."""\n    return b.g( x )\n',
            True,
        ),
        ("lib/a.py", SOURCES["lib/a.py"].replace("g(x)", "g(-x)"), False),
        ("lib/b.py", SOURCES["lib/b.py"].replace("1", "2"), False),
        ("lib/c.py", "thing = 0\n", False),
        ("lib/d/__init__.py", 'MODELS = {\n    "one": "lib.d.e:one",\n    "two": "lib.d.f:two",\n}\n', True),
        ("lib/d/__init__.py", 'OTHERS = {"one": "lib.d.e:one"}\n', False),
        ("lib/d/e.py", SOURCES["lib/d/e.py"].replace("None", "0"), False),
        ("lib/apart.py", "x = 2\n", True),
    ],
)
def test_sources_count_for_what_they_do_however_far_they_are_imported(tmp_path, file, text, same):
    hashes = []
    for folder, files in (("old", SOURCES), ("new", {**SOURCES, file: text})):
        for name, source in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        hashes.append(sources_hash(("lib.a",), tmp_path / folder))
    assert (hashes[0] == hashes[1]) is same


def test_every_module_that_makes_a_number_is_among_the_sources():
    found = keys.sources(("lib.models.nullbus",))
    assert {"lib.models.nullbus", "lib.models.blocks", "lib.text"} <= found.keys()
    assert found.keys().isdisjoint(("lib.data", "lib.wording"))
