"""Patches of live transformers models: exact tiled attention, applied to one instance, proved, and undone bit for bit.

Importing this module registers the attention implementation ``rehead_tiled`` with transformers.
"""

from rehead.patches.base import PATCHES, LayerRecord, Patch, PatchReport, patch_model, register_patch
from rehead.patches.blocks import ParallelPatch, SerialPatch
from rehead.patches.interface import NAME, register
from rehead.patches.tiled_patch import TiledPatch

register()

__all__ = [
    "NAME",
    "PATCHES",
    "LayerRecord",
    "ParallelPatch",
    "Patch",
    "PatchReport",
    "SerialPatch",
    "TiledPatch",
    "patch_model",
    "register_patch",
]
