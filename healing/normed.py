"""Moments of queries and keys that pass a norm, together with the inputs that they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.healing.moments import Batch, Moment, moment
from rehead.healing.rotation import Rotation


@moment("normed_queries")
class NormedQueries(Moment):
    """E[y y^T] with y = [x~, q] of each query head, [H, w + D, w + D]: q as normed, before its rotation."""

    rotates = True

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        assert batch.rotation is not None
        states = unrotated(batch.seen.queries.float(), batch.rotation, batch.seen.rows)
        _add(self, batch.x[:, batch.seen.rows], states, torch.ones_like(states[..., 0]))


@moment("normed_keys")
class NormedKeys(Moment):
    """E[y y^T] with y = [x~, k] of each KV head, [K, w + D, w + D]: k as normed, before its rotation.

    Each token is weighted by the squared attention that the head's queries pay to it.
    """

    rotates = True

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        assert batch.rotation is not None
        states = unrotated(batch.seen.keys.float(), batch.rotation)
        squared = batch.seen.probabilities.square().unflatten(1, (states.shape[1], -1)).sum((2, 3))
        _add(self, batch.x, states, squared)


def unrotated(states: Tensor, rotation: Rotation, rows: Tensor | None = None) -> Tensor:
    """States [b, heads, S, D] turned back to position 0; those at ``rows`` when given."""
    order = rotation.order(states.shape[-1])
    back = rotation.turn(states[..., order], rows, inverse=True)
    return back[..., order.argsort()]


def _add(moment: Moment, x: Tensor, states: Tensor, weight: Tensor) -> None:
    """Add inputs [b, S, w] and each head's states [b, heads, S, D], weighted by [b, heads, S]."""
    heads, width = states.shape[1], x.shape[-1] + states.shape[-1]
    total = moment.sums(heads, width, width, like=x)
    for head in range(heads):
        both = torch.cat([x, states[:, head]], -1).flatten(0, 1)
        total[head] += both.T @ (both * weight[:, head].reshape(-1, 1))
    moment.count(weight.sum((0, 2)).double().cpu())
