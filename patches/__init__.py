"""Patches of live transformers models: variants applied to one instance, proved or measured, and undone bit for bit.

Importing this module registers the attention implementation ``rehead_tiled`` with transformers.
"""

from rehead.attention.interface import NAME, register
from rehead.data.calibration import calibration_tokens
from rehead.patches.patch import Patch, live_names, patch_model
from rehead.patches.report import LayerRecord, PatchReport

register()

__all__ = ["NAME", "LayerRecord", "Patch", "PatchReport", "calibration_tokens", "live_names", "patch_model"]
