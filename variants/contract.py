"""What a variant is: one frozen record that says everything Rehead has to know about a form of attention or block.

A variant lives in its own folder, ``variants/NAME/``, and registers itself under its name; :data:`VARIANTS` finds it.
Nothing else in the project names it. The same record is a live patch (``patch_model(model, NAME, ...)``), a step of a
conversion (``rehead convert --variant NAME:key=value``), a row of ``rehead variants`` and a row of the tests' battery.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from rehead.errors import UsageError
from rehead.options import Options, named_options
from rehead.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rehead.attention.call import AttentionCall
    from rehead.models.heads import Heads
    from rehead.models.layout import LayerLayout
    from rehead.models.live import LayerState
    from rehead.models.model import Model
    from rehead.models.rewrite import Rewrite
    from rehead.models.undo import UndoLog

Compute = Any
"""Attention as it stands below a variant: an :class:`~rehead.attention.call.AttentionCall` in, [B, Sq, H, Dv] out."""

ALL, AUTO = "all", "auto"


def _layers(value: Any) -> Any:
    """Indices as they are given, a text as it is written."""
    if isinstance(value, str) and (value in (ALL, AUTO) or re.fullmatch(r"[\d\s,-]+", value)):
        return value
    if isinstance(value, (list, tuple, range)) and len(value) and all(type(index) is int for index in value):
        return tuple(value)
    raise ValueError(f"layers must be 'all', 'auto' or a list of indices, not {value!r}")


class VariantOptions(Options):
    """What every variant can be told."""

    layers: Annotated[str | tuple[int, ...], BeforeValidator(_layers)] = Field(
        ALL, description="Layers that change: all, a list such as 0,4-7, or auto for those that lose least."
    )


@dataclass(frozen=True)
class Variant:
    """A form that a model's attention or blocks can be given. Every part that a variant does not have is None.

    Attributes:
        name: as users write it.
        summary: one line for ``rehead variants`` and the help.
        source: the paper or report that it comes from.
        options: its own options; each field has a default, a type and a description.
        exact: (options) -> whether the result computes the same function as the original.
        off: (options) -> options under which nothing changes: the battery's first row and the ablation of `measure()`.
        ablated: (options) -> options without what is added to make up for what is taken away (sink tokens beside a
            window), or None. `measure()` says what the addition is worth: one that is worth nothing is decoration.
        layout: (layer, options) -> what that layer caches afterwards.
        library: (layer, context) -> options worth offering a layer whose cache is to shrink, priced by ``layout`` at
            that many tokens; a budget chooses among those of all variants. Empty for a variant that saves no cache.
        attend: (call, options, state, compute) -> [B, Sq, H, Dv]. What the layer computes, in terms of the attention
            below it: change the call and hand it on, or merge several calls. Patches stack by handing on. It finds the
            tiled attention below it whatever the model was loaded with.
        state: (layer, options) -> the layer's own tensors by name, fp32 (a sink logit for each head), which
            ``attend`` reads, the fit moves and the checkpoint stores. Empty for most.
        calibrate: (live variant, int [B, S] tokens, sequential) -> None: sets ``state`` from text, for options with
            ``needs``; ``sequential`` where a layer is to read what the changed layers before it give.
        cache: (live variant, undo) -> None: lets the caches of a live model keep what its layers still need, alone; or
            tells layers what they have to know of the keys in it.
        redirect: (model, options, indices, undo, memory) -> what was done to each layer: changes a live model where
            ``attend`` is not enough (a block's wiring, fused matrices). ``indices`` are the layers asked for, or None
            for all; every change goes through ``undo``; ``memory`` is a dictionary that outlives a patch that is taken
            off and put back, and its entry ``"temporary"`` says that this will happen.
        settles: whether what ``redirect`` does depends on the variants below it, which then cannot be switched.
        also: (options) -> (name, options) of other variants that some option stands for, applied after this one.
        reach: (options) -> tokens that a row must be longer than for anything to change.
        longer: whether texts beyond the model's trained length are what it is for.
        weights: (heads, options, moments) -> heads. The closed form, pure: what becomes of one layer's weights.
        rewrite: (model, options) -> the checkpoint's change: its config, class, names and shapes of tensors. A variant
            with ``weights`` whose shapes and class stay needs none. Where only the shapes tell that another class is
            needed, it raises :class:`~rehead.models.rewrite.NeedsHost` in place of having a ``host``.
        host: (model, options, classes that may stand in for the model's own) -> the one that must, so that the result
            can be held, or None where the model's own can.
        needs: (options) -> names of the moments (:mod:`rehead.healing.moments`) that ``weights`` reads.
        trains: (attention module) -> what the layer-wise fit and uptraining move; None for q, k, v and o.
    """

    name: str
    summary: str
    source: str
    options: type[VariantOptions]
    exact: Callable[[Any], bool]
    off: Callable[[Any], Any]
    ablated: Callable[[Any], Any | None] = lambda options: None
    layout: Callable[[LayerLayout, Any], LayerLayout] = lambda layer, options: layer
    library: Callable[[LayerLayout, int], list[Any]] = lambda layer, context: []
    attend: Callable[[AttentionCall, Any, Mapping[str, Tensor], Compute], Tensor] | None = None
    state: Callable[[LayerLayout, Any], dict[str, Tensor]] | None = None
    calibrate: Callable[[Any, Tensor, bool], None] | None = None
    cache: Callable[[Any, UndoLog], None] | None = None
    redirect: Callable[[Any, Any, set[int] | None, UndoLog, dict[str, Any]], list[LayerState]] | None = None
    settles: bool = False
    also: Callable[[Any], list[tuple[str, dict[str, Any]]]] = lambda options: []
    reach: Callable[[Any], int] = lambda options: 0
    longer: bool = False
    weights: Callable[[Heads, Any, Any], Heads] | None = None
    rewrite: Callable[[Model, Any], Rewrite] | None = None
    host: Callable[[Model, Any, Sequence[str]], str | None] = lambda model, options, hosts: None
    needs: Callable[[Any], tuple[str, ...]] = lambda options: ()
    trains: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None


VARIANTS: Registry[Variant] = Registry(
    "variant",
    {
        "pool": "rehead.variants.pool.variant",
        "uneven": "rehead.variants.uneven.variant",
        "prune": "rehead.variants.prune.variant",
        "latent": "rehead.variants.latent.variant",
        "tiled": "rehead.variants.tiled",
        "window": "rehead.variants.window",
        "sparse": "rehead.variants.sparse",
        "far": "rehead.variants.far",
        "context": "rehead.variants.context.variant",
        "dual_chunk": "rehead.variants.dual_chunk",
        "self_extend": "rehead.variants.self_extend",
        "parallel": "rehead.variants.blocks.variant",
        "serial": "rehead.variants.blocks.variant",
        "fuse": "rehead.variants.fuse.variant",
        "temperature": "rehead.variants.temperature",
    },
)
"""Name -> the module that registers it when imported. A new variant is one line here."""


def register(variant: Variant) -> Variant:
    """Make a variant known under its name.

    Raises:
        ValueError: the name is taken.
    """
    VARIANTS.add(variant.name, variant)
    return variant


def saved_variant(text: str) -> tuple[Variant, VariantOptions]:
    """A variant that a checkpoint can hold and its options, out of ``"NAME:key=value,key=value"``.

    Raises:
        UsageError: no such variant or option, an invalid value, or a variant that no checkpoint can hold.
    """
    name, options = named_options(text, lambda name: VARIANTS.get(name).options, "--variant")
    variant = VARIANTS.get(name)
    if variant.rewrite is None and variant.weights is None:
        raise UsageError(
            f"--variant {name}: changes live models only, so no checkpoint can hold it; use patch_model, or evaluate "
            f"--patch {name}"
        )
    return variant, options
