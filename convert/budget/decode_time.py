"""How long a step of decoding attends to the cache, timed on the device for each layout that a layer may have.

Only attention itself is timed, over a cache of random numbers that is full: projections and feed-forward parts take the
same time whatever the cache is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.models.layout import LayerLayout
from rehead.models.live import clock
from rehead.models.recording import record

#: Seconds that a measurement takes at least, and measurements of which the fastest counts.
_SPAN, _REPEATS = 2e-3, 5


@dataclass
class DecodeTimes:
    """Seconds of attention in one step of decoding; every layout is timed once.

    Attributes:
        context: tokens read before.
        batch: sequences.
        device: where it is timed; on a GPU in bfloat16 where the cache has 16 bits, else in float32.
    """

    context: int
    batch: int
    device: torch.device
    _known: dict[LayerLayout, float] = field(default_factory=dict)

    def total(self, layouts: Iterable[LayerLayout]) -> float:
        """Seconds over all of a model's layers."""
        return sum(map(self.of, layouts))

    def of(self, layout: LayerLayout) -> float:
        """Seconds in one layer; 0 without attention."""
        if layout.num_heads == 0:
            return 0.0
        key = replace(layout, index=0)
        if key not in self._known:
            self._known[key] = seconds(decode_call(key, self.context, self.batch, self.device), self.device)
        return self._known[key]


def decode_call(layout: LayerLayout, context: int, batch: int, device: torch.device) -> AttentionCall:
    """The attention of one new token of each sequence over a full cache of a layout, as the tiled attention runs it."""
    dtype = torch.bfloat16 if device.type == "cuda" and layout.itemsize == 2 else torch.float32
    tokens = max(1, layout.tokens_kept(context))

    def drawn(heads: int, count: int, width: int) -> Tensor:
        return torch.randn(batch, heads, count, width, device=device).to(dtype)

    kv = layout.num_key_value_heads
    # Groups of unequal size are computed as equal ones of the largest.
    query = drawn(-(-layout.num_heads // kv) * kv, 1, layout.key_dim)
    rules = {"scale": layout.key_dim**-0.5, "q_offset": tokens - 1}
    if layout.value_dim:
        return AttentionCall(query, drawn(kv, tokens, layout.key_dim), drawn(kv, tokens, layout.value_dim), **rules)
    rank = layout.key_dim if layout.reads is None else layout.reads - layout.key_dim  # the rest is a rotated key
    latents, tail = drawn(kv, tokens, layout.key_dim).split([rank, layout.key_dim - rank], -1)
    return AttentionCall(query, latents.contiguous(), latents.contiguous(), key_tail=tail.contiguous(), **rules)


@torch.no_grad()
def seconds(call: AttentionCall, device: torch.device) -> float:
    """Seconds of one call; on a GPU without the time that Python takes to launch it."""
    step: Callable[[], object] = lambda: attend(call)  # noqa: E731
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            step()
        recorded = record(step, stream)
        if recorded is not None:
            step = recorded[0].replay
    step()
    runs = 1
    while (once := _span(step, runs, device)) < _SPAN:
        runs = max(2 * runs, int(runs * _SPAN / max(once, 1e-7)))
    return min(once, *(_span(step, runs, device) for _ in range(_REPEATS - 1))) / runs


def _span(step: Callable[[], object], runs: int, device: torch.device) -> float:
    start = clock(device)
    for _ in range(runs):
        step()
    return clock(device) - start
