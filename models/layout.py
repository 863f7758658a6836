"""What one layer keeps of the past: the one place that says how large a KV cache is.

Plans, `inspect`, the model card, evaluation and reports all read their bytes here, so a window, a latent and a shared
KV head are priced alike. A cache is counted in numbers; ``itemsize`` makes bytes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Contexts at which the size of a cache is told.
CONTEXTS = (1024, 8192, 32768)


@dataclass(frozen=True)
class LayerLayout:
    """One decoder layer's attention as a cache sees it.

    Attributes:
        index: the layer's place in the model.
        num_heads: query heads; 0 in a layer without attention.
        num_key_value_heads: heads that keys and values are stored for; 1 for a latent, which all heads share.
        key_dim: numbers stored as the key of one token and KV head.
        value_dim: numbers stored as its value; 0 where values are read out of what is stored as keys.
        window: how many tokens back one sees, itself included, or None for all of them. Those before it are kept.
        sinks: first tokens of a text that a window never lets go.
        fixed: numbers kept whatever the length (the state of a recurrent layer).
        stores: False where the layer reads what another one stores.
        itemsize: bytes of one number.
    """

    index: int
    num_heads: int
    num_key_value_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    sinks: int = 0
    fixed: int = 0
    stores: bool = True
    itemsize: int = 2

    @property
    def numbers_per_token(self) -> int:
        """Numbers that one more token adds while nothing is let go."""
        return self.num_key_value_heads * (self.key_dim + self.value_dim) if self.stores else 0

    def tokens_kept(self, context: int) -> int:
        """Tokens in the cache once ``context`` of them have been read."""
        return context if self.window is None else min(context, self.window - 1 + self.sinks)

    def cache_bytes(self, context: int) -> int:
        """Bytes in the cache of one sequence once ``context`` tokens have been read."""
        return self.itemsize * (self.fixed + self.numbers_per_token * self.tokens_kept(context))

    def with_heads(self, num_key_value_heads: int) -> LayerLayout:
        """The same layer with another number of KV heads."""
        return replace(self, num_key_value_heads=num_key_value_heads)


def cache_bytes(layers: Sequence[LayerLayout], context: int) -> int:
    """Bytes in the cache of one sequence over all layers once ``context`` tokens have been read."""
    return sum(layer.cache_bytes(context) for layer in layers)


def bytes_per_token(layers: Sequence[LayerLayout]) -> int:
    """Bytes that one more token adds over all layers while no window is full."""
    return sum(layer.itemsize * layer.numbers_per_token for layer in layers)


def sizes(layers: Sequence[LayerLayout]) -> dict[str, int]:
    """Bytes in the cache at each of :data:`CONTEXTS`, by context; JSON."""
    return {str(context): cache_bytes(layers, context) for context in CONTEXTS}


def windows(layers: Sequence[LayerLayout]) -> list[int]:
    """The windows that layers have, ascending; where there are any, bytes per token do not tell the size of a cache."""
    return sorted({layer.window for layer in layers if layer.window is not None})
