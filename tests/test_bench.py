"""The benchmark measures what it says and keeps what it did not measure."""

import csv
import importlib.util
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "bench/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_take_turns_and_the_first_turn_is_not_counted(bench):
    calls = []
    arms = {"ours": lambda: calls.append("ours"), "other": lambda: (calls.append("other"), time.sleep(0.01))}
    times = bench.take_turns(arms, 3, "cpu")
    assert calls == ["other", "ours"] * 4
    assert len(times["ours"]) == len(times["other"]) == 3
    assert times["other"].min() >= 10 > times["ours"].max()


def test_results_replace_their_own_pair_and_device_only(bench, tmp_path):
    def measure(name, device="cpu"):
        pair = bench.Pair(name, "nothing, quickly", 1, 2, {"ours": int, "other": str})
        rows = bench.rows_of(pair, "cpu")
        return [bench.Row(**{**vars(row), "device": device}) for row in rows]

    path = tmp_path / "results.csv"
    for rows in (measure("a"), measure("b"), measure("a", "cuda"), measure("a")):
        bench.merge(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pair"], row["device"], row["arm"]) for row in rows] == [
        (pair, device, arm) for pair, device in (("b", "cpu"), ("a", "cuda"), ("a", "cpu")) for arm in ("ours", "other")
    ]
    assert all(float(row["p10_ms"]) <= float(row["p50_ms"]) <= float(row["p90_ms"]) for row in rows)
    assert all(row["torch"] and row["hardware"] and row["n"] == "2" for row in rows)


def test_an_unknown_pair_is_named(bench, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "bootstarp"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "there is no pair 'bootstarp': choose from caption_bank, image_cache" in capsys.readouterr().err


def test_the_targets_of_a_volume_share_its_context(bench):
    prompts = bench.volume_prompts(6, 4, "cpu", volumes=2)
    context, target = prompts.pooled["context"], prompts.pooled["target"]
    assert (context[:3] == context[0]).all() and (context[3:] == context[3]).all()
    assert not torch.equal(context[0], context[3]) and len(target.unique(dim=0)) == 6
