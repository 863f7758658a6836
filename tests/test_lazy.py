"""Names that are loaded on first use: there for `dir`, for `import *`, and nothing heavy before."""

from __future__ import annotations

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
