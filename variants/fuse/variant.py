"""The variant ``fuse``: blocks computed in as few products as the form that they have now allows. Exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rehead.errors import UnsupportedError, UsageError, first_line
from rehead.models import probing
from rehead.models.distance import difference
from rehead.models.live import LayerState
from rehead.models.predictions import Predictions, predict
from rehead.models.tolerance import allowance, by_rounding, rounding
from rehead.models.undo import UndoLog
from rehead.variants.blocks.anatomy import Block, check_live, find_blocks
from rehead.variants.blocks.redirect import BLOCK
from rehead.variants.contract import Variant, VariantOptions, register
from rehead.variants.fuse.fused import Fusion
from rehead.variants.layer_choice import check_known


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[None]:
    """Inside the block no layer has another form than the model was loaded with."""
    states = [module.__dict__[BLOCK] for module in model.modules() if BLOCK in module.__dict__]
    before = [(state, state.enabled) for state in states]
    try:
        for state in states:
            state.enabled = False
        yield
    finally:
        for state, enabled in before:
            state.enabled = enabled


def _form(block: Block) -> str:
    """What a block computes now."""
    state = block.layer.__dict__.get(BLOCK)
    return state.now if state is not None and state.enabled else block.form


def fuse(
    model: nn.Module, options: VariantOptions, asked: set[int] | None, undo: UndoLog, memory: dict[str, Any]
) -> list[LayerState]:
    """Put the fused matrices in.

    Reverting takes them out: bit for bit, or, where the model was trained meanwhile, to the same function as trained.
    Trained weights go into the block's own parameters exactly; the norms, whose weights they hold, become ones.

    Raises:
        UsageError: a layer that has no attention.
        UnsupportedError: a block has something that does not fuse, or computes something else then.
    """
    check_live(model)
    with _as_loaded(model):
        blocks = find_blocks(model)
    check_known(asked or set(), [block.index for block in blocks])
    picked = [block for block in blocks if asked is None or block.index in asked]
    memory["untouched"] = [block.name for block in blocks if block not in picked]
    fusions = []
    for block in picked:
        form, module = _form(block), type(block.layer).__name__
        fusions.append(Fusion(block, form, LayerState(block.name, block.index, module, form, form, "fused")))
    want = _probe_logits(model)
    with probing.frozen(model):
        moved = rounding(model, [block.name for block in picked], _probe(model), want)
    ready = memory.get("ready", {})
    for fusion in fusions:
        fusion.apply(undo, ready.get((fusion.block.name, fusion.form)))
    _check(model, want, moved)
    for fusion in fusions:
        fusion.state.calls = 0
    undo.set_attribute(model, "save_pretrained", _refuse_saving)
    undo.guard(lambda: _before_undoing(fusions, memory))
    return [fusion.state for fusion in fusions]


def _before_undoing(fusions: list[Fusion], memory: dict[str, Any]) -> Callable[[], None] | None:
    """What writes trained weights back. Matrices that come back soon stay the objects that an optimizer may hold."""
    pending = [write for fusion in fusions if (write := fusion.trained()) is not None]
    if not memory.get("temporary"):
        memory.pop("ready", None)

        def write_back() -> None:
            for write in pending:
                write()

        return write_back
    if pending:
        raise UsageError(
            "weights were changed while fused, so there is no unfused model to compare with; revert() first"
        )
    memory["ready"] = {(fusion.block.name, fusion.form): fusion.fused() for fusion in fusions}
    return None


def _probe(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": probing.probe_tokens(model, 8, 2, seed=1)}


def _probe_logits(model: nn.Module) -> Predictions:
    with probing.frozen(model):
        return predict(model, _probe(model))


def _check(model: nn.Module, want: Predictions, moved: float) -> None:
    """What reads a norm past the matrices that were found, or runs in another order, shows here."""
    try:
        got = _probe_logits(model)
    except (KeyError, RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} does not run fused ({first_line(error, 100)}); patch it with fused=False"
        ) from error
    limit = allowance(want)
    gap = difference(got, want)
    if not gap <= limit and not gap <= max(limit, by_rounding(model, moved, want)):
        raise UnsupportedError(
            f"{type(model).__name__} computes something else when fused (by {gap:.1e}, {limit:.1e} allowed): "
            "its norms are read by more than its matrices; patch it with fused=False"
        )


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise UsageError("a fused model's tensors are not those of its class; revert() the patch before save_pretrained")


FUSE = register(
    Variant(
        name="fuse",
        summary="exact: the norms folded into the matrices that read them, blocks in two (parallel) or four products",
        source="Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022, arXiv 2204.02311",
        options=VariantOptions,
        exact=lambda options: True,
        off=lambda options: options,
        redirect=fuse,
        settles=True,
    )
)
