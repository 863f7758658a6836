"""In which order rows are seen: a pure function of (seed, step), so that resuming needs nothing but the step."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def permuted(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a keyed permutation of ``range(size)`` sends some indices; no table of all of them is ever made.

    A balanced Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: int64 ``[n]`` in ``range(size)``.
        size: how many there are.
        seed, epoch: the key.

    Returns:
        int64 ``[n]`` in ``range(size)``; distinct indices go to distinct places.
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch)
    found = np.array(index, dtype=np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        found[outside] = _feistel(found[outside], keys, np.uint64(half), mask)
        outside = found >= size
    return found.astype(np.int64)


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

    Steps go through the rows without a gap: every epoch sees each row once, in an order of its own, and a step may end
    one epoch and begin the next.

    Args:
        step: from 0.
        rows_per_step: rows in a step, over all processes.
        size: rows in all.
        seed: of the order.

    Returns:
        int64 ``[rows_per_step]``.
    """
    places = np.arange(step * rows_per_step, (step + 1) * rows_per_step, dtype=np.int64)
    rows = np.empty_like(places)
    for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
        here = places // size == epoch
        rows[here] = permuted(places[here] % size, size, seed, epoch)
    return rows
