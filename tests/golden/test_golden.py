"""The book's functions against reference numbers of the official codes.

GOLDEN_DIR (default ../shared/golden beside the repository) holds NAME.npz (arrays) and NAME.json (function, arguments,
tolerance). A case is matched to its adapter by the function's name; one without adapter is skipped by name.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.adapters import ADAPTERS, CHAPTERS, adapter

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))


@dataclass
class Case:
    """One reference case: what was computed, from which arguments, and the arrays that went in and came out."""

    name: str
    function: str
    arguments: dict
    tolerance: float
    arrays: dict[str, np.ndarray]
    columns: list[str]  # of the array `metrics`
    inputs: set[str] = field(default_factory=set)

    def array(self, name: str) -> np.ndarray:
        """An input array; every array that no adapter takes as input is an output, and must be computed."""
        self.inputs.add(name)
        return self.arrays[name]

    def tensor(self, name: str, grad: bool = False) -> torch.Tensor:
        return torch.from_numpy(self.array(name).copy()).requires_grad_(grad)

    def parameters(self, module: str) -> dict[str, torch.Tensor]:
        """The state dict of the module of this name in the reference."""
        start = f"param:{module}."
        return {name.removeprefix(start): self.tensor(name) for name in self.arrays if name.startswith(start)}


def read_case(path: Path) -> Case:
    about = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
        arrays = dict(stored)
    columns = about.get("outputs", {}).get("metrics", [])
    return Case(path.stem, about["function"], about["arguments"], about["tolerance"], arrays, columns)


def case_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.with_suffix(".npz").exists())


def compare(case: Case, computed: dict[str, np.ndarray]) -> None:
    """Fail unless every output of the case is computed and |a - b| <= tolerance (1 + |b|) everywhere."""
    outputs = set(case.arrays) - case.inputs
    assert set(computed) == outputs, (
        f"{case.name}: the adapter computes {sorted(computed)}, but the case's outputs are {sorted(outputs)}."
    )
    for name, value in computed.items():
        expected = case.arrays[name]
        value = np.asarray(value)
        assert value.shape == expected.shape, f"{case.name}: {name} has shape {value.shape}, not {expected.shape}."
        np.testing.assert_allclose(
            value, expected, rtol=case.tolerance, atol=case.tolerance, err_msg=f"{case.name}: {name}"
        )


def check(case: Case) -> None:
    if case.function not in ADAPTERS:
        chapter = CHAPTERS.get(case.name.split("_")[0], "not decided")
        pytest.skip(f"no adapter yet for {case.name}: {case.function} (belongs to chapter {chapter})")
    compare(case, ADAPTERS[case.function](case))


ABSENT = pytest.mark.skip(reason=f"No reference numbers in {FOLDER}: point GOLDEN_DIR at the folder that holds them.")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in case_files(FOLDER)] or [pytest.param(None, id="none", marks=ABSENT)],
)
def test_golden(path):
    check(read_case(path))


def write_case(folder, function="twice", value=(2.0, 4.0)):
    np.savez(folder / "duplus_twice.npz", x=np.array([1.0, 2.0]), y=np.array(value))
    about = {"function": function, "arguments": {}, "tolerance": 1e-3}
    (folder / "duplus_twice.json").write_text(json.dumps(about))
    return read_case(folder / "duplus_twice.json")


@pytest.fixture
def twice(monkeypatch):
    monkeypatch.setitem(ADAPTERS, "twice", lambda case: {"y": 2 * case.array("x")})


def test_a_value_within_the_tolerance_passes_and_one_beyond_it_fails(tmp_path, twice):
    check(write_case(tmp_path, value=(2.0, 4.004)))
    with pytest.raises(AssertionError, match="duplus_twice: y"):
        check(write_case(tmp_path, value=(2.0, 4.006)))


def test_an_output_that_the_adapter_leaves_out_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "twice", lambda case: {})
    with pytest.raises(AssertionError, match=r"outputs are \['x', 'y'\]"):
        check(write_case(tmp_path))


def test_a_case_without_adapter_is_skipped_by_name(tmp_path):
    with pytest.raises(pytest.skip.Exception, match=r"no adapter yet for duplus_twice: thrice \(belongs .* DuPLUS\)"):
        check(write_case(tmp_path, function="thrice"))


def test_a_function_has_one_adapter(twice):
    with pytest.raises(ValueError, match="Two adapters for 'twice'"):
        adapter("twice")(lambda case: {})
