"""Runs the loss kernel's tests in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreting import no_gpu, passes_interpreted, triton_there


@no_gpu
@triton_there
@pytest.mark.parametrize("name", ["test_loss_kernels.py"])
def test_in_the_interpreter(name):
    passes_interpreted(Path(__file__).with_name(name))
