"""Rehead gives pretrained transformers new attention.

Importing the package is cheap: nothing heavy is loaded until one of its parts is used::

    from rehead.convert import convert

    convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", num_key_value_heads=8, method="svd")
"""

from __future__ import annotations

import os
import sys

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

# Threads that wait for work by spinning take the cores from other programs, and from threads that hash and write.
# torch's read this once, when torch is imported; what the user has set stays.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Makes checkpoints that use Rehead's own model classes load; does nothing until transformers is imported.
_install_models()
