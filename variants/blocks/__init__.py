"""Serial and parallel blocks of a live model: the form changed per instance, fused, measured, and taken back.

::

    with patch_model(model, "parallel", layers=[4, 5, 6], calibration=tokens) as patch:
        print(patch.report())  # how far off each block is, and the model
"""

from rehead.variants.blocks.anatomy import PARALLEL, SERIAL, Block, find_blocks
from rehead.variants.blocks.measure import BlockMeasure, calibration_tokens
from rehead.variants.blocks.patch import ParallelPatch, SerialPatch
from rehead.variants.blocks.ranking import Choice, LayerLoss, choose_layers, rank_layers
from rehead.variants.blocks.report import BlockRecord, BlockReport

__all__ = [
    "PARALLEL",
    "SERIAL",
    "Block",
    "BlockMeasure",
    "BlockRecord",
    "BlockReport",
    "Choice",
    "LayerLoss",
    "ParallelPatch",
    "SerialPatch",
    "calibration_tokens",
    "choose_layers",
    "find_blocks",
    "rank_layers",
]
