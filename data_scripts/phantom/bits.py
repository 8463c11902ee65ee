"""The same bits from a seed on every x86-64 processor."""

import os
import platform
import sys

# numpy and OpenBLAS choose instructions by the processor, and sums in another order differ in the last bit: enough to
# turn a grey level, hence a dataset's fingerprint, hence the key of every run on it. All x86-64 processors since 2009
# have these.
BASELINE = {
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Nehalem",
}


def same_bits() -> None:
    """Start the running script again, once, with the instructions that all x86-64 processors share; none on others."""
    if platform.machine() in ("x86_64", "AMD64") and any(os.environ.get(k) != v for k, v in BASELINE.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **BASELINE})
