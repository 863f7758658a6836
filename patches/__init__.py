"""Patches of live transformers models: exact tiled attention, applied to one instance, proved, and undone bit for bit.

Importing this module registers the attention implementation ``rehead_tiled`` with transformers.
"""

from rehead.attention.interface import NAME, register
from rehead.patches.patch import PATCHES, LayerRecord, Patch, PatchReport, patch_model, register_patch
from rehead.patches.tiled_patch import TiledPatch
from rehead.variants.blocks.patch import ParallelPatch, SerialPatch

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
