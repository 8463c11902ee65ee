"""What changed since a run was made is read from the repository's history."""

import json
import subprocess

import pytest

from lib import staleness

SOURCES = {
    "requirements.lock": "torch==1\n",
    "lib/__init__.py": "",
    "lib/data.py": "SPLIT = 1\n",
    "lib/text.py": "class PromptPolicy:\n    columns: tuple\n    perturbation: str\n",
    "lib/training.py": "class Budget:\n    steps: int\n",
    "lib/evaluation.py": "from lib import data\n",
    "lib/wording.py": 'def typo(text):\n    return text\n\n\nREWRITES: dict = {"typo": typo}\n',
    "lib/models/__init__.py": 'MODELS = {"net": "lib.models.net:build", "other": "lib.models.other:build"}\n',
    "lib/models/net.py": "WIDTH = 8\n\ndef build():\n    return WIDTH\n\ndef shown():\n    return 1\n",
    "lib/models/other.py": "def build():\n    return 8\n",
    "lib/losses/__init__.py": 'LOSSES: dict[str, str] = {"dice": "lib.losses.dice:dice"}\n',
    "lib/losses/dice.py": "def dice():\n    return 1\n",
    "lib/runs.py": """
class Test:
    name: str
    prompts: object

class Experiment:
    arm: str
    model: str
    loss: str
    seed: int
    prompts: object
    tests: tuple
    budget: object
    parts: tuple

def train():
    return 1

def show():
    return 1

def _taught():
    return 1

def _key():
    steps = [train]
    steps += [_taught]
""",
}


def git(home, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *words], cwd=home, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def home(tmp_path):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def record(home, key="k", perturbation="none", **more):
    prompts = {"columns": [], "perturbation": perturbation}
    settings = {"model": "net", "loss": "dice@w=2", "seed": 0, "prompts": prompts, "budget": {"steps": 1}, "parts": {}}
    settings |= {"tests": [{"name": "t", "prompts": prompts}]} | more
    meta = {"commit": git(home, "rev-parse", "HEAD"), "dirty": False, "datasets": {"d": {"fingerprint": "one"}}}
    return {"key": key, "arm": key, "experiment": settings, "meta": meta}


def found(home, *records, data=None, together=()):
    return staleness.changes(records, data, home, together)


def test_a_run_of_today_is_current(home):
    assert found(home, record(home)) == {"k": []}


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("lib/data.py", "1", "2", ["code: data"]),
        ("lib/data.py", "SPLIT = 1", "# why\nSPLIT   =  1", []),
        ("lib/models/net.py", "8", "9", ["code: models.net"]),
        ("lib/models/net.py", "return 1", "return 2", []),
        ("lib/models/other.py", "8", "9", []),
        ("lib/losses/dice.py", "1", "2", ["code: losses.dice"]),
        ("lib/wording.py", "return text", "return 1", []),
        ("lib/runs.py", "def train():\n    return 1", "def train():\n    return 2", ["code: runs"]),
        ("lib/runs.py", "def _taught():\n    return 1", "def _taught():\n    return 2", ["code: runs"]),
        ("lib/runs.py", "def show():\n    return 1", "def show():\n    return 2", []),
        ("lib/runs.py", "    seed: int\n", "    seed: int\n    window: int\n", ["settings since: window"]),
        ("lib/training.py", "steps: int", "steps: int\n    cycles: int", ["settings since: cycles", "code: training"]),
        ("requirements.lock", "1", "2", ["pins of requirements.lock"]),
        ("lib/models/__init__.py", '"net": "lib.models.net:build", ', "", ["code: its model or loss is no longer in"]),
    ],
)
def test_only_what_can_change_its_numbers_makes_a_run_stale(home, file, old, new, said):
    made = record(home)
    text = (home / file).read_text()
    assert old in text
    (home / file).write_text(text.replace(old, new))
    reasons = found(home, made)["k"]
    assert len(reasons) == len(said) and all(map(str.startswith, reasons, said))


def test_wording_counts_for_runs_that_reword(home):
    made = [record(home, "plain"), record(home, "reworded", "typo")]
    (home / "lib/wording.py").write_text(SOURCES["lib/wording.py"].replace("return text", "return 1"))
    assert found(home, *made) == {"plain": [], "reworded": ["code: wording"]}


def test_a_run_built_on_a_stale_one_is_stale(home):
    below, above = record(home, "below", model="other"), record(home, "above", parts={"tower": "below"})
    (home / "lib/models/other.py").write_text("def build():\n    return 9\n")
    assert found(home, below, above) == {"below": ["code: models.other"], "above": ["built on below"]}


def test_staleness_goes_through_any_number_of_runs_in_any_order(home):
    top = record(home, "top", parts={"chain": "middle"})
    middle = record(home, "middle", pseudo={"experiment": "below"})
    below = record(home, "below", model="other")
    (home / "lib/models/other.py").write_text("WIDTH = 9\n")
    for order in ((top, middle, below), (below, middle, top)):
        assert found(home, *order)["top"] == ["built on middle"]


def test_arms_of_the_same_name_on_another_page_are_others(home):
    made = {
        (page, arm): record(home, f"{page} {arm}", model="other" if page == "b" and arm == "tower" else "net")
        | {"arm": arm}
        for page in "ab"
        for arm in ("tower", "above")
    }
    for page in "ab":
        made[page, "above"]["experiment"]["parts"] = {"tower": "tower"}
    (home / "lib/models/other.py").write_text("WIDTH = 9\n")
    pages = [{f"{page} tower", f"{page} above"} for page in "ab"]
    reasons = found(home, *made.values(), together=pages)
    assert reasons["a above"] == [] and reasons["b above"] == ["built on tower"]


def test_members_of_an_ensemble_have_seeds_of_their_own(home):
    member, whole = record(home, "member", model="other", seed=7), record(home, "whole", parts={"1": "member"})
    (home / "lib/models/other.py").write_text("WIDTH = 9\n")
    assert found(home, member, whole)["whole"] == ["built on member"]


def test_what_cannot_be_told_is_said(home, tmp_path):
    made = record(home)
    made["meta"] |= {"commit": "0" * 40, "dirty": True}
    assert found(home, made)["k"] == ["made with changes that were not committed", staleness.UNKNOWN]


def test_data_made_again_is_seen_where_it_is_here(home):
    made, card = record(home), home / "data/d/card.json"
    assert found(home, made, data=home / "data") == {"k": []}
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps({"fingerprint": "two"}))
    assert found(home, made, data=home / "data") == {"k": ["data: d"]}
