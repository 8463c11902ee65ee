"""A seed draws the same phantoms on every x86-64 processor, so that runs on them have the same keys there."""

import json
import os
import platform
import subprocess
import sys

import numpy
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors: other bits")
OLDER = "X86_V4 AVX512_ICL AVX512_SPR"  # a laptop without AVX-512, as numpy sees it


def drawn(folder, kind, **processor) -> str:
    """The fingerprint of what the script draws where numpy and OpenBLAS are told what processor they run on."""
    script = [sys.executable, str(ROOT / "data_scripts/phantoms.py"), kind, "--n", "24", "--out", str(folder)]
    subprocess.run(script, env={**os.environ, **processor}, check=True, capture_output=True)
    return json.loads((folder / "card.json").read_text())["fingerprint"]


@pytest.mark.parametrize("kind", ["bus", "torso_mr"])
def test_any_processor_draws_the_same(kind, tmp_path):
    found = {
        drawn(tmp_path / "this", kind),
        drawn(tmp_path / "older", kind, NPY_DISABLE_CPU_FEATURES=OLDER, OPENBLAS_CORETYPE="Haswell"),
    }
    assert len(found) == 1


def test_the_names_of_the_instructions_are_those_of_this_numpy():
    """numpy passes over a name that it does not know, so a new numpy might dispatch again."""
    from phantom.bits import BASELINE

    dispatched = numpy._core._multiarray_umath.__cpu_dispatch__
    assert set(dispatched) <= set(BASELINE["NPY_DISABLE_CPU_FEATURES"].split())
