"""Runs the kernel tests in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreting import no_gpu, passes_interpreted, triton_there

# A case of every rule that has code of its own; the rest is left to `make test-all`.
FEW = {
    "test_kernels.py": "test_parity_in_float32 and (gqa or static or window or chunk or sinks or segments or bias)",
    "test_kernels_decode.py": "holes or everything or bias or sinks or mqa or zero or never_used",
}


@no_gpu
@triton_there
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_in_the_interpreter(name, few):
    passes_interpreted(Path(__file__).with_name(name), *(["-k", FEW[name]] if few else []))
