"""The variants ``parallel`` and ``serial``: the blocks of a live model in the other form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import nn

from rehead.errors import UsageError
from rehead.models.live import LayerState
from rehead.models.undo import UndoLog
from rehead.variants.blocks.anatomy import PARALLEL, SERIAL, check_live, find_blocks
from rehead.variants.blocks.forms import reblock
from rehead.variants.blocks.redirect import BLOCK, redirect
from rehead.variants.contract import Variant, VariantOptions, register
from rehead.variants.layer_choice import check_known


class BlockOptions(VariantOptions):
    """Options of both block variants."""

    fused: bool = Field(False, description="Also compute the blocks in few products: the variant fuse.")
    plain: bool = Field(False, description="Refuse a checkpoint that needs a modelling file of Rehead's.")


def _redirected(form: str) -> Callable[..., list[LayerState]]:
    """How blocks get a form: those that have it already stay as they are."""

    def change(
        model: nn.Module, options: BlockOptions, asked: set[int] | None, undo: UndoLog, memory: dict[str, Any]
    ) -> list[LayerState]:
        check_live(model)
        blocks = find_blocks(model)
        check_known(asked or set(), [block.index for block in blocks])
        picked = [b for b in blocks if (asked is None or b.index in asked) and b.form != form]
        if not picked and not options.fused:
            raise UsageError(f"every chosen layer is {form} already; choose others, or fused=True")
        memory["untouched"] = [block.name for block in blocks if block not in picked]
        states = []
        for block in picked:
            module = type(block.layer).__name__
            state = LayerState(block.name, block.index, module, block.form, form, "redirected", options=options)
            redirect(block, state, undo)
            undo.set_attribute(block.layer, BLOCK, state)
            states.append(state)
        return states

    return change


def _variant(form: str, summary: str) -> Variant:
    return register(
        Variant(
            name=form,
            summary=summary,
            source="Chowdhery et al. 2022, arXiv 2204.02311; Wang and Komatsuzaki 2021 (GPT-J)",
            options=BlockOptions,
            exact=lambda options: False,
            off=lambda options: options,
            redirect=_redirected(form),
            rewrite=lambda model, options: reblock(model, form, options.layers, options.plain),
            also=lambda options: [("fuse", {"layers": options.layers})] if options.fused else [],
        )
    )


# ``z = x + Attn(N1 x) + MLP(N2 x)`` in place of ``y = x + Attn(N1 x); z = y + MLP(N2 y)``: not the same function. A
# norm that a parallel block shares is used twice in the serial one.
PARALLEL_VARIANT = _variant(
    PARALLEL, "serial blocks as parallel ones (approximate); fused=True computes them in two products"
)
SERIAL_VARIANT = _variant(
    SERIAL, "parallel blocks as serial ones (approximate); fused=True computes them in four products"
)
