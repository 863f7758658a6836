"""Runs the kernel tests in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreting import no_gpu, passes_interpreted, triton_there

FILES = ("test_kernels.py", "test_kernels_edges.py", "test_kernels_decode.py", "test_block_scores.py")


@no_gpu
@triton_there
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    passes_interpreted(Path(__file__).with_name(name))
