"""Plan which rectangles of the score matrix to compute, and which of them need a mask.

Pure integer arithmetic, no tensors. A plan is a list of :class:`Tile`; every visible (query, key) pair is in exactly
one tile, and tiles that share query rows are merged by log-sum-exp. There are three kinds of tile because PyTorch's CPU
flash kernel computes two of them without a mask: a rectangle that is entirely visible, and a square whose lower
triangle is. Only irregular rectangles (window edges, biases, irregular padding) need a mask, for one tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["plain", "causal", "masked"]

QUERY_BLOCK = 256
"""Rows per masked tile: long enough for the kernel's own blocks, short enough to waste little work at window edges."""
MASK_ELEMENTS = 1 << 21
"""Largest number of elements of one mask (8 MB in float32)."""


@dataclass(frozen=True)
class Tile:
    """Query rows ``[q0, q1)`` against keys ``[k0, k1)``."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind


@dataclass(frozen=True)
class Rect:
    """Query rows and keys that may see one another, before causality and the window are applied."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True)
class Extent:
    """The rules for visibility inside a rectangle, and limits on its tiles.

    Attributes:
        causal: row ``i`` sees key ``j`` only if ``j <= i + offset``.
        offset: position of row 0 on the keys' axis.
        window: row ``i`` sees key ``j`` only if ``i + offset - j < window``.
        chunk: row ``i`` sees key ``j`` only if both fall into the same block of ``chunk`` positions.
        dense: every tile needs a mask (a bias, ALiBi, or padding and segments with holes).
        tiled: split everything into tiles of bounded size, for explicit scores.
        mask_heads: heads with masks of their own; tiles are smaller by this factor.
    """

    causal: bool
    offset: int = 0
    window: int | None = None
    chunk: int | None = None
    dense: bool = False
    tiled: bool = False
    mask_heads: int = 1


def plan(rects: list[Rect], rules: Extent) -> list[Tile]:
    """The tiles that cover all visible pairs in ``rects``, which must not overlap."""
    tiles: list[Tile] = []
    for rect in rects:
        for part in _split_chunks(rect, rules):
            tiles.extend(_cover(part, rules))
    if rules.tiled:
        tiles = [part for tile in tiles for part in _bounded(tile)]
    return tiles


def _split_chunks(rect: Rect, rules: Extent) -> Iterator[Rect]:
    """The rectangles of chunked attention: independent blocks on the diagonal."""
    if rules.chunk is None:
        yield rect
        return
    size, offset = rules.chunk, rules.offset
    for index in range((rect.q0 + offset) // size, (rect.q1 - 1 + offset) // size + 1):
        low, high = index * size, (index + 1) * size
        part = Rect(max(rect.q0, low - offset), min(rect.q1, high - offset), max(rect.k0, low), min(rect.k1, high))
        if part.q0 < part.q1 and part.k0 < part.k1:
            yield part


def _cover(rect: Rect, rules: Extent) -> Iterator[Tile]:
    q0, q1, k0, k1 = rect.q0, rect.q1, rect.k0, rect.k1
    if rules.causal:
        # Rows before the first key see no key, and no row sees keys after the last row.
        q0, k1 = max(q0, k0 - rules.offset), min(k1, q1 + rules.offset)
    if rules.window is not None:
        k0 = max(k0, q0 + rules.offset - rules.window + 1)
        q1 = min(q1, k1 - rules.offset + rules.window - 1)
    if q0 >= q1 or k0 >= k1:
        return
    rect = Rect(q0, q1, k0, k1)
    windowed = rules.window is not None and q1 - 1 + rules.offset - k0 >= rules.window
    if rules.dense:
        yield from _dense(rect, rules)
    elif windowed:
        yield from _window(rect, rules)
    elif rules.causal:
        yield from _triangle(rect, rules.offset)
    else:
        yield Tile(q0, q1, k0, k1, "plain")


def _triangle(rect: Rect, offset: int) -> Iterator[Tile]:
    """Causal attention over one run of keys: at most a plain block, a square with a diagonal, and a plain block."""
    q0, q1, k0, k1 = rect.q0, rect.q1, rect.k0, rect.k1
    # Row `k1 - 1 - offset` is the first to see every key; it is the last of the square, and later rows need no mask.
    bend = min(q1, max(q0, k1 - offset))
    first = q0 + offset
    if bend - q0 == 1:
        yield Tile(q0, bend, k0, first + 1, "plain")
    elif q0 < bend:
        if k0 < first:
            yield Tile(q0, bend, k0, first, "plain")
        yield Tile(q0, bend, first, first + bend - q0, "causal")
    if bend < q1:
        yield Tile(bend, q1, k0, k1, "plain")


def _query_blocks(q0: int, q1: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(q0, q1, size):
        yield start, min(start + size, q1)


def _visible_keys(a: int, b: int, rect: Rect, rules: Extent) -> tuple[int, int]:
    """The keys that at least one of the rows ``[a, b)`` sees."""
    low, high = rect.k0, rect.k1
    if rules.window is not None:
        low = max(low, a + rules.offset - rules.window + 1)
    if rules.causal:
        high = min(high, b + rules.offset)
    return low, high


def _window(rect: Rect, rules: Extent) -> Iterator[Tile]:
    """Tiles of a window: one masked tile for each block of rows, or edge, interior and edge if the window is wide."""
    assert rules.window is not None
    # A block adds its own length to the computed band, so it must be much shorter than the window.
    size = min(QUERY_BLOCK, max(32, rules.window // 4))
    for a, b in _query_blocks(rect.q0, rect.q1, size):
        low, high = _visible_keys(a, b, rect, rules)
        if low >= high:
            continue
        # Keys in [inner_low, inner_high) are seen by every row of the block.
        inner_low = max(low, b + rules.offset - rules.window)
        inner_high = min(high, a + rules.offset + 1) if rules.causal else high
        if inner_low <= low and inner_high >= high:
            yield Tile(a, b, low, high, "plain")
        elif (b - a) * (high - low) <= MASK_ELEMENTS or inner_low >= inner_high:
            yield from _key_tiles(a, b, low, high, (b - a))
        else:
            if low < inner_low:
                yield Tile(a, b, low, inner_low, "masked")
            yield Tile(a, b, inner_low, inner_high, "plain")
            if inner_high < high:
                yield Tile(a, b, inner_high, high, "masked")


def _dense(rect: Rect, rules: Extent) -> Iterator[Tile]:
    size = min(QUERY_BLOCK, rect.q1 - rect.q0)
    for a, b in _query_blocks(rect.q0, rect.q1, size):
        low, high = _visible_keys(a, b, rect, rules)
        if low < high:
            yield from _key_tiles(a, b, low, high, (b - a) * rules.mask_heads)


def _key_tiles(a: int, b: int, low: int, high: int, column: int) -> Iterator[Tile]:
    width = max(64, MASK_ELEMENTS // max(1, column))
    for start in range(low, high, width):
        yield Tile(a, b, start, min(start + width, high), "masked")


def _bounded(tile: Tile) -> Iterator[Tile]:
    """Split one tile into tiles whose scores fit in memory."""
    for a, b in _query_blocks(tile.q0, tile.q1, QUERY_BLOCK // 2):
        if tile.kind == "causal":
            first, last = tile.k0 + a - tile.q0, tile.k0 + b - tile.q0
            yield from _bounded_keys(Tile(a, b, tile.k0, first, "plain"))
            yield Tile(a, b, first, last, "causal")
        else:
            yield from _bounded_keys(replace(tile, q0=a, q1=b))


def _bounded_keys(tile: Tile) -> Iterator[Tile]:
    for start in range(tile.k0, tile.k1, 4 * QUERY_BLOCK):
        yield replace(tile, k0=start, k1=min(start + 4 * QUERY_BLOCK, tile.k1))
