"""One attention layer of a live model that computes with the tiled attention, and the variants in front of it."""

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
"""Attention as it stands below a variant: a call in, ``[B, Sq, H, Dv]`` out."""

Attend = Callable[[AttentionCall, Any, Mapping[str, Tensor], Compute], Tensor]
"""What a variant computes: (call, options, the layer's own tensors, the attention below it)."""


@dataclass(eq=False)
class AttentionLayer:
    """An attention module while the tiled attention is installed.

    Attributes:
        name: in the model.
        index: of the decoder layer that it belongs to.
        module: its class.
        was: the attention implementation that it had.
        how: ``"interface"`` or ``"adapter"``.
        variants: what is in front of the tiled attention; the last one gets the call first.
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
    """The first ``count`` variants, those that are switched off left out, in front of the tiled attention."""
    while count:
        variant, state = variants[count - 1]
        count -= 1
        if state.enabled:
            state.count()
            return variant(call, state.options, state.tensors, functools.partial(_through, variants, count))
    return attend(call)
