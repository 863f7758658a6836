"""Texts that repeat stretches of themselves, so that a model has a reason to look far back; prose hardly gives any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from rehead.data.calibration import CalibrationText
from rehead.data.store import Rows

#: Tokens of a sequence that :func:`repeating` changes, at least, and of a stretch that is repeated.
REPEATING, STRETCH = 1024, 64
#: Tokens of a stretch that :func:`with_repeats` repeats.
SHORTEST, LONGEST = 16, 128
#: The part of a document that it replaces by copies, at most.
COPIED = 1 / 4


def repeating(text: CalibrationText, seed: int = 0) -> CalibrationText:
    """Every fourth long sequence ends with stretches of itself.

    Prose hardly ever looks far back, so a fit to prose alone gives up what a layer still copies (measured on SmolLM2
    with windows in 21 of 30 layers, see docs/variants/window.md).

    Args:
        text: its sequences of fewer than :data:`REPEATING` tokens are not changed.
        seed: of which stretches.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rows in text.tokens:
        length = rows.shape[1]
        begin = 3 * length // 4
        if length >= REPEATING:
            rows = rows.clone()
            for row in rows[::4]:
                for at in range(begin, length - STRETCH + 1, STRETCH):
                    first = int(torch.randint(0, begin - STRETCH, (), generator=generator))
                    row[at : at + STRETCH] = row[first : first + STRETCH].clone()
        parts.append(rows)
    return replace(text, tokens=parts)


def with_repeats(rows: Rows, places: np.ndarray, share: float, seed: int, start: int = 0) -> Rows:
    """Training rows, some of them with stretches that repeat earlier ones of the same document.

    Stretches have :data:`SHORTEST` to :data:`LONGEST` tokens; their distances are drawn uniformly from a stretch's
    length up to the document's, so that far ones are not rarer than near ones. Stretches that would overlap are left
    out. Which rows and which stretches depends on seed and place alone. A row whose positions restart holds several
    documents (:meth:`rehead.data.store.TokenStore.read`); those shorter than four of the shortest stretches are not
    changed.

    Args:
        rows: labels are copied with their tokens, and stay ignored where a copied token begins a document.
        places: int64 ``[n]``, the rows' places in the order of training.
        share: of the rows, 0 to 1; evenly spread over the places.
        seed: of the order.
        start: tokens that begin a text (:func:`rehead.data.beginning.text_start`), which are never changed or copied.
    """
    repeats = np.floor((places + 1) * share) > np.floor(places * share)
    if not repeats.any():
        return rows
    tokens, labels = rows.input_ids.clone(), rows.labels.clone()
    for i in np.flatnonzero(repeats):
        draw = np.random.default_rng([seed, int(places[i])])
        begins = np.flatnonzero(rows.position_ids[i].numpy() == 0).tolist()
        for begin, end in zip(begins, [*begins[1:], tokens.shape[1]]):
            for at, distance, size in _stretches(begin + max(start, 1), end - 1, draw):
                source = at - distance
                tokens[i, at : at + size] = tokens[i, source : source + size]
                labels[i, at - 1 : at + size - 1] = labels[i, source - 1 : source + size - 1]
    return Rows(tokens, rows.position_ids, labels)


def _stretches(begin: int, end: int, draw: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """(place, distance back, tokens) of stretches between two places, in their order and without overlap."""
    longest = min(LONGEST, (end - begin) // 4)
    if longest < SHORTEST:
        return
    stretches: list[tuple[int, int, int]] = []
    free = np.ones(end, dtype=bool)
    mean = (SHORTEST + longest) / 2
    for _ in range(max(1, int(COPIED * (end - begin) / mean))):
        size = int(draw.integers(SHORTEST, longest + 1))
        distance = int(draw.integers(size, end - begin - size + 1))
        at = int(draw.integers(begin + distance, end - size + 1))
        if free[at : at + size].all():
            free[at : at + size] = False
            stretches.append((at, distance, size))
    yield from sorted(stretches)  # from left to right, so that a stretch is what it repeats when all is done
