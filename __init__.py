"""Rehead gives pretrained transformers new attention.

Importing the package is cheap: nothing heavy is loaded until one of its parts is used::

    from rehead.convert import convert

    convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", num_key_value_heads=8, method="svd")
"""

from __future__ import annotations

from rehead.lazy import exports
from rehead.models.modeling import install as _install_models
from rehead.version import __version__

_EXPORTS = {
    "patch_model": "rehead.patches",
    "ReheadError": "rehead.errors",
}
_PARTS = ("convert", "patches", "recipes", "errors")

__all__ = ["__version__", *_EXPORTS, *_PARTS]


__getattr__ = exports(__name__, _EXPORTS, _PARTS)

# Makes checkpoints that use Rehead's own model classes load; does nothing until transformers is imported.
_install_models()
