"""The order of training rows: a pure function of seed and step, so that resuming needs only the step."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def permuted(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Images of some indices under a pseudorandom permutation of ``range(size)``, computed without a table.

    A balanced Feistel network over the next even power of two, applied until the result is below ``size`` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: int64 ``[n]`` in ``range(size)``.
        size: number of elements that are permuted.
        seed, epoch: the permutation's key.

    Returns:
        int64 ``[n]`` in ``range(size)``; distinct indices have distinct images.
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch)
    images = np.array(index, dtype=np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        images[outside] = _feistel(images[outside], keys, np.uint64(half), mask)
        outside = images >= size
    return images.astype(np.int64)


def _keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha256(f"rehead order {seed} {epoch}".encode()).digest()
    digest += hashlib.sha256(digest).digest()
    return np.frombuffer(digest, dtype="<u8")[:_ROUNDS].astype(np.uint64)


def _feistel(x: np.ndarray, keys: np.ndarray, half: np.uint64, mask: np.uint64) -> np.ndarray:
    left, right = x >> half, x & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as a hash should
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
    return (left << half) | right


def rows_of_step(step: int, rows_per_step: int, size: int, seed: int) -> np.ndarray:
    """The rows of one optimiser step.

    Every epoch has each row once, in an order of its own; a step may contain the end of one epoch and the start of the
    next.

    Args:
        step: 0 for the first.
        rows_per_step: rows per step, over all processes.
        size: total rows.
        seed: seed of the order.

    Returns:
        int64 ``[rows_per_step]``.
    """
    places = np.arange(step * rows_per_step, (step + 1) * rows_per_step, dtype=np.int64)
    rows = np.empty_like(places)
    for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
        here = places // size == epoch
        rows[here] = permuted(places[here] % size, size, seed, epoch)
    return rows
