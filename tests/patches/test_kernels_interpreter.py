"""Runs the kernel tests in Triton's interpreter, in a child process: it must be chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUNNER = """
import sys, pytest
from triton.runtime import interpreter

# The interpreter keeps scalars as arrays of one element, which recent NumPy refuses to turn into an int.
original = interpreter._patch_lang_tensor
def patched(tensor, scope):
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))
interpreter._patch_lang_tensor = patched
sys.exit(pytest.main(sys.argv[1:]))
"""


# A case of every rule that has code of its own; the rest is left to `make test-all`.
FEW = {
    "test_kernels.py": "test_parity_in_float32 and (gqa or static or window or chunk or sinks or segments or bias)",
    "test_kernels_decode.py": "holes or everything or bias or sinks or mqa or zero or never_used",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
def test_in_the_interpreter(name, few):
    options = ["-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-k", FEW[name]] if few else []
    child = subprocess.run(
        [sys.executable, "-c", RUNNER, *options, str(Path(__file__).with_name(name))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-1000:]
    assert " passed" in child.stdout
