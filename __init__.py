"""Rehead gives pretrained transformers new attention.

Importing the package is cheap: nothing heavy is loaded until one of its parts is used::

    from rehead.convert import convert

    convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", num_key_value_heads=8, method="svd")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rehead.convert.modeling import install as _install_models

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "patch_model": "rehead.patches",
    "ReheadError": "rehead.errors",
}
_PARTS = ("convert", "patches", "recipes", "errors")

__all__ = ["__version__", *_EXPORTS, *_PARTS]


def __getattr__(name: str) -> Any:
    """Load a part or a public function on first use (PEP 562), so that `rehead --help` never imports torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _PARTS:
        return import_module(f"rehead.{name}")
    raise AttributeError(f"module 'rehead' has no attribute {name!r}")


# Checkpoints with blocks of ours load by name; what this needs of transformers waits until that is imported.
_install_models()
