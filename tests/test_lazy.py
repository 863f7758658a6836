"""Names that are loaded on first use: there for `dir`, for `import *`, and nothing heavy before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ("rehead", "rehead.convert", "rehead.recipes", "rehead.recipes.training", "rehead.recipes.evaluation")


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_there_and_listed(name: str) -> None:
    package = import_module(name)
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_listing_loads_nothing_heavy() -> None:
    lines = [
        f"import {', '.join(PACKAGES)}, sys",
        *(f"dir({name})" for name in PACKAGES),
        "assert 'torch' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime of torch for Linux tells how long it spins")
@pytest.mark.parametrize(
    ("code", "given", "spins"),
    [
        ("import rehead, torch", None, False),
        ("import rehead, torch", "ACTIVE", True),  # what the user has set stays
        ("import torch, os, rehead; assert 'OMP_WAIT_POLICY' not in os.environ", None, True),  # too late to say
    ],
)
def test_threads_that_wait_leave_the_cores_to_others(code: str, given: str | None, spins: bool) -> None:
    """As the threads' own runtime tells it, which reads the environment when torch is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    told = re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if told is None:
        pytest.skip("another OpenMP runtime, which does not tell")
    assert (told[1] != "0") == spins
