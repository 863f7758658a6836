"""One attention layer of a live model that uses the tiled attention, with the variants applied to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.models.live import LayerState

LAYER = "_rehead_layer"
"""Attribute of an attention module that holds its :class:`AttentionLayer` while the tiled attention is installed."""

Compute = Callable[[AttentionCall], Tensor]
"""The attention that a variant wraps: a call in, ``[B, Sq, H, Dv]`` out."""

Attend = Callable[[AttentionCall, Any, Mapping[str, Tensor], Compute], Tensor]
"""A variant's attention: (call, options, the variant's tensors in this layer, the attention that it wraps)."""


@dataclass(eq=False)
class AttentionLayer:
    """An attention module while the tiled attention is installed.

    Attributes:
        name: the module's name in the model.
        index: index of its decoder layer; None outside all of them.
        module: the name of its class.
        was: its attention implementation before.
        how: ``"interface"`` or ``"adapter"``.
        variants: the variants around the tiled attention; the last one gets the call first.
    """

    name: str
    index: int | None
    module: str
    was: str
    how: str
    variants: list[tuple[Attend, LayerState]] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> Tensor:
        """The layer's attention, ``[B, Sq, H, Dv]``."""
        return _through(self.variants, len(self.variants), call)


def _through(variants: list[tuple[Attend, LayerState]], count: int, call: AttentionCall) -> Tensor:
    """Attention through the first ``count`` variants, except disabled ones, and then the tiled attention."""
    while count:
        variant, state = variants[count - 1]
        count -= 1
        if state.enabled:
            state.count()
            return variant(call, state.options, state.tensors, functools.partial(_through, variants, count))
    return attend(call)
