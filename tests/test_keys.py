"""Which changes of the code a run's key sees."""

from pathlib import Path

import pytest

from lib import keys
from lib.keys import sources_hash

ROOT = Path(__file__).resolve().parents[1]


SOURCES = {
    "lib/__init__.py": "",
    "lib/a.py": 'from lib import b\nfrom .c import y\n\ndef f(x):\n    """Say."""\n    return b.g(x, y)  # why\n',
    "lib/b.py": "import lib.d.e\nSTEP = 1\n\ndef g(x, y):\n    return lib.d.e.one(STEP)\n\ndef h(x):\n    return 1\n",
    "lib/c.py": "from math import pi\ny = other = pi\nrest = 0\n",
    "lib/d/__init__.py": 'MODELS = {"one": "lib.d.e:one"}\n',
    "lib/d/e.py": "def one(*, key=None, **rest):\n    from lib.f import tenth\n    return {**rest}\n",
    "lib/f.py": "from lib.h import tenth, third\n",
    "lib/h.py": "tenth = 0.1\nthird = 0.3\n",
    "lib/apart.py": "x = 1\n",
}


def changed(file, old, new):
    assert old in SOURCES[file]
    return file, SOURCES[file].replace(old, new)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (changed("lib/a.py", '"""Say."""', '"""Tell."""'), True),
        (changed("lib/a.py", "b.g(x, y)  # why", "b.g( x, y )"), True),
        (changed("lib/a.py", "g(x", "g(-x"), False),
        (changed("lib/b.py", "one(STEP)", "one(-STEP)"), False),
        (changed("lib/b.py", "STEP = 1", "STEP = 2"), False),
        (changed("lib/b.py", "return 1", "return 2"), True),  # h is none of f's business
        (changed("lib/b.py", "def g", "print()\n\ndef g"), False),  # runs whoever imports it
        (changed("lib/c.py", "= pi", "= 3"), False),
        (changed("lib/c.py", "import pi", "import e as pi"), False),
        (changed("lib/c.py", "rest = 0", "rest = 1"), True),
        (changed("lib/d/__init__.py", "}", ', "two": "lib.d.f:two"}'), True),
        (changed("lib/d/__init__.py", "}", "}\nprint()"), False),
        (changed("lib/d/e.py", "None", "0"), False),
        (changed("lib/h.py", "0.1", "0.2"), False),  # passed on by f, imported within a function
        (changed("lib/h.py", "0.3", "0.2"), True),
        (changed("lib/apart.py", "1", "2"), True),
    ],
)
def test_sources_count_for_what_they_do_however_far_they_are_imported(tmp_path, change, same):
    hashes = []
    for folder, files in (("old", SOURCES), ("new", SOURCES | dict([change]))):
        for name, source in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        hashes.append(sources_hash(("lib.a:f",), tmp_path / folder))
    assert (hashes[0] == hashes[1]) is same


def test_a_module_counts_by_what_is_asked_of_it():
    whole, part = keys.sources(("lib.models.malenia",)), keys.sources(("lib.models.entries:build",))
    assert {"lib.models.malenia", "lib.models.blocks", "lib.losses.queries", "lib.text"} <= whole.keys()
    assert 0 < len(part["lib.models.malenia"]) < len(whole["lib.models.malenia"])
    assert part.keys().isdisjoint(("lib.losses.queries", "lib.data", "lib.wording"))
