"""What each layer stores in the KV cache, and how many bytes that takes.

Plans, `inspect`, the model card, evaluation and reports all take their bytes from here, so windows, latents and shared
KV heads are counted the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Contexts (tokens) for which cache sizes are reported.
CONTEXTS = (1024, 8192, 32768)


@dataclass(frozen=True)
class LayerLayout:
    """What one decoder layer's attention stores in the cache.

    Attributes:
        index: the layer's index in the model.
        num_heads: query heads; 0 in a layer without attention.
        num_key_value_heads: heads that keys and values are stored for; 1 for a latent, which all heads share.
        key_dim: numbers per token and KV head stored as the key.
        value_dim: numbers per token and KV head stored as the value; 0 where values are computed from the stored keys.
        window: tokens that a query sees, its own included, or None for all; only those before it are stored.
        sinks: first tokens of a text, which stay in the cache beside a window.
        fixed: numbers stored regardless of the length (the state of a recurrent layer).
        stores: False where the layer reads another layer's cache.
        itemsize: bytes per number.
        reads: products per cached token and query head in one step of decoding; None for ``key_dim + value_dim``. A
            latent is read twice, for scores and for values.
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
    reads: int | None = None

    @property
    def numbers_per_token(self) -> int:
        """Numbers that each token adds to the cache while the window is not full."""
        return self.num_key_value_heads * (self.key_dim + self.value_dim) if self.stores else 0

    def tokens_kept(self, context: int) -> int:
        """Tokens in the cache once ``context`` of them have been read."""
        return context if self.window is None else min(context, self.window - 1 + self.sinks)

    def cache_bytes(self, context: int) -> int:
        """Bytes in the cache of one sequence once ``context`` tokens have been read."""
        return self.itemsize * (self.fixed + self.numbers_per_token * self.tokens_kept(context))

    def attention_flops(self, context: int) -> int:
        """Operations on the cache for one more token behind ``context`` others, multiplications and additions counted
        apart; projections, which do not grow with the context, are left out."""
        products = self.key_dim + self.value_dim if self.reads is None else self.reads
        return 2 * self.num_heads * products * self.tokens_kept(context)

    def with_heads(self, num_key_value_heads: int) -> LayerLayout:
        """The same layer with another number of KV heads."""
        return replace(self, num_key_value_heads=num_key_value_heads)


def cache_bytes(layers: Sequence[LayerLayout], context: int) -> int:
    """Bytes in the cache of one sequence over all layers once ``context`` tokens have been read."""
    return sum(layer.cache_bytes(context) for layer in layers)


def bytes_per_token(layers: Sequence[LayerLayout]) -> int:
    """Bytes that each token adds over all layers while no window is full."""
    return sum(layer.itemsize * layer.numbers_per_token for layer in layers)


def sizes(layers: Sequence[LayerLayout]) -> dict[str, int]:
    """Bytes in the cache at each of :data:`CONTEXTS`, by context; JSON."""
    return {str(context): cache_bytes(layers, context) for context in CONTEXTS}


def windows(layers: Sequence[LayerLayout]) -> list[int]:
    """The layers' distinct windows, ascending. With windows, bytes per token alone do not give the cache's size."""
    return sorted({layer.window for layer in layers if layer.window is not None})
