"""Caches of a live model under windows: layers with one keep no more than it shows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache

from rehead.attention.ring import RING
from rehead.counts import LONGEST
from rehead.errors import UsageError
from rehead.models.live import LayerState
from rehead.models.modeling.modeling_rehead_cache import passed_cache
from rehead.models.modeling.modeling_rehead_ring import WindowLayer, use_windows
from rehead.models.undo import UndoLog

if TYPE_CHECKING:
    from rehead.variants.stack import LiveVariant


def shrink_caches(live: LiveVariant, undo: UndoLog) -> None:
    """Let every cache that the model is called with keep windows, until undone.

    Layers whose attention goes through an adapter, and those with a window of their own, keep their caches.
    """
    size, sinks = live.options.size, live.options.sinks  # type: ignore[attr-defined]
    if size >= LONGEST:
        return
    layers: list[tuple[int, nn.Module, LayerState]] = []
    for state in live.states:
        module = live.model.get_submodule(state.name)
        index = getattr(module, "layer_idx", None)
        if state.how == "interface" and isinstance(index, int):
            layers.append((index, module, state))
            undo.add(functools.partial(module.__dict__.pop, RING, None))

    def windows() -> list[tuple[int, int, int]]:
        return [(index, size, sinks) for index, _, state in layers if state.enabled]

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache: Any = passed_cache(kwargs)
        there = getattr(cache, "layers", None)
        if there is not None and not (torch.is_grad_enabled() and model.training):
            use_windows(cache, windows(), kwargs.get("attention_mask"))
        for index, module, state in layers:
            mine = there[index] if there is not None and index < len(there) else None
            ring = mine if isinstance(mine, WindowLayer) else None
            if ring is not None and not state.enabled and ring.seen > ring.kept:
                raise UsageError("the cache has dropped what a window hides, which is off now; start with a new cache")
            module.__dict__[RING] = ring

    prepare = getattr(live.model, "_prepare_cache_for_generation", None)

    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Window layers from the start of a generation, so that drafted tokens can be taken back."""
        assert prepare is not None
        prepare(generation_config, model_kwargs, *args)
        if isinstance(cache := passed_cache(model_kwargs), Cache):
            use_windows(cache, windows())

    if prepare is not None:
        undo.set_attribute(live.model, "_prepare_cache_for_generation", prepared)
    body: Any = getattr(live.model, "base_model", live.model)
    undo.add(body.register_forward_pre_hook(before, with_kwargs=True).remove)
