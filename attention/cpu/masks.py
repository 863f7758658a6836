"""Additive masks of single tiles, built only for tiles that need one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rehead.attention.cpu.plan import Extent, Rect, Tile

NEG_INF = float("-inf")


@dataclass
class Row:
    """Which keys are visible in one batch row, or in all rows if they agree.

    Attributes:
        rects: independent rectangles of rows and keys.
        key_mask: ``[Skv]`` bool, kept only when it has holes.
        q_segments, kv_segments: ``[Sq]`` and ``[Skv]``, kept only when they are not plain runs.
    """

    rects: list[Rect]
    key_mask: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None

    @property
    def irregular(self) -> bool:
        return self.key_mask is not None or self.q_segments is not None


def runs(segments: Tensor) -> list[tuple[int, int, int]] | None:
    """``[S]`` segment ids as ``(id, start, stop)`` runs, or None where an id comes back after a gap."""
    ids, counts = torch.unique_consecutive(segments, return_counts=True)
    names, lengths = ids.tolist(), counts.tolist()
    if len(set(names)) != len(names):
        return None
    out, start = [], 0
    for name, length in zip(names, lengths, strict=True):
        out.append((name, start, start + length))
        start += length
    return out


def read_row(
    n_query: int,
    n_key: int,
    start: int,
    end: int,
    key_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
) -> Row:
    """One batch row's bounds, padding and segments, as rectangles where they are regular.

    Args:
        n_query, n_key: row and key counts.
        start, end: the keys that may be seen at all.
        key_mask: ``[n_key]`` bool or None.
        q_segments, kv_segments: integer ids, ``[n_query]`` and ``[n_key]``, or None.
    """
    start, end = max(0, start), min(n_key, end)
    if key_mask is not None:
        seen = key_mask.nonzero()
        if seen.numel() == 0:
            return Row([])
        first, last = int(seen[0]), int(seen[-1]) + 1
        holes = last - first != seen.numel()
        start, end = max(start, first), min(end, last)
        key_mask = key_mask if holes else None
    whole = [Rect(0, n_query, start, end)] if start < end else []
    if q_segments is None or kv_segments is None:
        return Row(whole, key_mask)
    q_runs, kv_runs = runs(q_segments), runs(kv_segments)
    # Very short runs cost more as calls than as one mask.
    if q_runs is None or kv_runs is None or len(q_runs) > max(16, n_query // 16):
        return Row(whole, key_mask, q_segments, kv_segments)
    keys = {name: (a, b) for name, a, b in kv_runs}
    rects = []
    for name, a, b in q_runs:
        low, high = keys.get(name, (0, 0))
        low, high = max(low, start), min(high, end)
        if low < high:
            rects.append(Rect(a, b, low, high))
    return Row(rects, key_mask)


@dataclass
class TileMasks:
    """Builds the additive mask of a tile: float, ``[N|1, G|1, q, k]``, with -inf where a key is hidden.

    Attributes:
        rules: causality, window and chunk.
        row: irregular padding and segments.
        alibi: ``[N, G]`` slopes, or None.
        bias: ``[N|1, G|1, Sq|1, Skv|1]`` bool (True is visible) or float, or None.
        dtype: of the mask; float32 also for half-precision queries, so that biases keep their digits.
    """

    rules: Extent
    row: Row
    alibi: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    _bands: dict[tuple[int, int, int], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __call__(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """(the mask; bool ``[N|1, G|1, q]``, which rows of the tile see no key, or None if all see one)."""
        # Without biases and irregular rows the mask depends only on the distance to the diagonal, so tiles share it.
        shared = self.alibi is None and self.bias is None and not self.row.irregular and self.rules.chunk is None
        place = (tile.q1 - tile.q0, tile.k1 - tile.k0, tile.q0 + self.rules.offset - tile.k0)
        if shared and place in self._bands:
            return self._bands[place]
        mask = self._build(tile)
        hidden = (mask == NEG_INF).all(-1)
        result = (mask, hidden if bool(hidden.any()) else None)
        if shared:
            self._bands[place] = result
        return result

    def _build(self, tile: Tile) -> Tensor:
        rules = self.rules
        position = torch.arange(tile.q0, tile.q1)[:, None] + rules.offset
        key = torch.arange(tile.k0, tile.k1)[None, :]
        visible = torch.ones(tile.q1 - tile.q0, tile.k1 - tile.k0, dtype=torch.bool)
        if rules.causal:
            visible &= key <= position
        if rules.window is not None:
            visible &= position - key < rules.window
        if rules.chunk is not None:
            visible &= torch.div(position, rules.chunk, rounding_mode="floor") == torch.div(
                key, rules.chunk, rounding_mode="floor"
            )
        if self.row.key_mask is not None:
            visible &= self.row.key_mask[tile.k0 : tile.k1][None, :]
        if self.row.q_segments is not None and self.row.kv_segments is not None:
            visible &= (
                self.row.q_segments[tile.q0 : tile.q1][:, None] == self.row.kv_segments[tile.k0 : tile.k1][None, :]
            )
        mask = torch.zeros((), dtype=self.dtype).expand(1, 1, *visible.shape)
        if self.alibi is not None:
            mask = mask + self.alibi.to(self.dtype)[..., None, None] * (key - position).to(self.dtype)
        if self.bias is not None:
            part = _slice(self.bias, tile)
            if part.dtype == torch.bool:
                visible = visible & part
            else:
                mask = mask + part.to(self.dtype)
        return torch.where(visible, mask, NEG_INF)


def _slice(bias: Tensor, tile: Tile) -> Tensor:
    """The tile's part of a bias whose last two dimensions may be broadcast."""
    if bias.shape[-2] != 1:
        bias = bias[..., tile.q0 : tile.q1, :]
    if bias.shape[-1] != 1:
        bias = bias[..., tile.k0 : tile.k1]
    return bias
