"""Triton's interpreter, for tests of kernels on machines without a GPU."""

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

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
triton_there = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def passes_interpreted(*files: Path) -> None:
    """Run the files' tests in a child process, in which the interpreter is chosen before Triton is imported."""
    common = ["-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    child = subprocess.run(
        [sys.executable, "-c", RUNNER, *common, *map(str, files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-1000:]
    assert " passed" in child.stdout
