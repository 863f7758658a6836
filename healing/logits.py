"""Refit of queries and keys to the attention logits of the original layer, in closed form.

For fixed keys the attention logits are linear in the query projections, and for fixed queries in the key projections.
Both problems are solved by conjugate gradients on the true logits (with the true rotary angles), weighted by the
original's attention probabilities, without each row's mean, which softmax ignores. The targets are the original
layer's logits on its own activations; the inputs are those that the changed layers before really produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import Heads, augmented

#: Conjugate-gradient steps of one solve, and the order of the solves.
STEPS = 15
SCHEDULE = ("q", "k", "q")
#: Pull towards the start, relative to the problem's own curvature: directions that the text does not determine stay.
DAMPING = 1e-2


@dataclass
class LogitTargets:
    """Target logits of some queries of one batch.

    Attributes:
        x: inputs of the converted layer [b, S, w], with a last column of ones for biases.
        rows: positions of the R queries, int64 [R].
        probabilities: the original's attention probabilities for them [b, H, R, S].
        scores: the original's logits for them before masking [b, H, R, S].
    """

    x: Tensor
    rows: Tensor
    probabilities: Tensor
    scores: Tensor


class LogitModel:
    """Attention logits as a function of the query and key projections, whose rows are in :meth:`Rotation.order`.

    Args:
        rotation: the model's rotary embedding.
        scaling: factor on the dot products.
    """

    def __init__(self, rotation: Rotation, scaling: float) -> None:
        self.rotation, self.scaling = rotation, scaling

    def weights(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """(queries [H, D, w], keys [kv, D, w]) of a layer, float32."""
        order = self.rotation.order(heads.head_dim)
        q, k = augmented(heads, "q").float()[:, order], augmented(heads, "k").float()[:, order]
        return q, k

    def states(self, x: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rotated queries or keys [b, heads, R, D] at ``rows`` of inputs [b, S, w], from weights [heads, D, w]."""
        x = x if rows is None else x[:, rows]
        flat = (x @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2])
        return self.rotation.turn(flat.transpose(1, 2), rows)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logits before masking [b, H, R, S] of rotated queries [b, H, R, D] and keys [b, kv, S, D]."""
        grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # the queries of a group in one product
        return (grouped @ keys.transpose(-1, -2) * self.scaling).reshape(*queries.shape[:3], keys.shape[2])

    def pull_queries(self, x: Tensor, rows: Tensor, error: Tensor, keys: Tensor) -> Tensor:
        """The adjoint of the logits in the query projections: [H, D, w]."""
        grouped = error.unflatten(1, (keys.shape[1], -1)).flatten(2, 3) @ keys * self.scaling
        pulled = self.rotation.turn(grouped.reshape(*error.shape[:3], -1), rows, inverse=True)
        return _adjoint(pulled, x[:, rows])

    def pull_keys(self, x: Tensor, error: Tensor, queries: Tensor, kv: int) -> Tensor:
        """The adjoint of the logits in the key projections: [kv, D, w]."""
        grouped = error.unflatten(1, (kv, -1)).flatten(2, 3).transpose(-1, -2)
        pulled = grouped @ queries.unflatten(1, (kv, -1)).flatten(2, 3) * self.scaling
        return _adjoint(self.rotation.turn(pulled, inverse=True), x)


def _adjoint(states: Tensor, x: Tensor) -> Tensor:
    """sum over batch and positions of states [b, heads, R, D] times inputs [b, R, w]: [heads, D, w]."""
    flat = states.transpose(1, 2).flatten(2).flatten(0, 1)  # [b * R, heads * D]
    return (flat.T @ x.flatten(0, 1)).unflatten(0, (states.shape[1], -1))


def refit_logits(heads: Heads, model: LogitModel, targets: Sequence[LogitTargets], moments: Moments) -> Heads:
    """The heads with query and key projections refitted to the original's logits.

    Args:
        heads: the pooled layer, without a query or key norm (logits would not be linear in the projections).
        model: computes logits from the projections.
        targets: batches of the calibration text.
        moments: the layer's moments; the second moment of its inputs preconditions and damps.
    """
    values, vectors = moments.input_eigen
    values = values / moments.inputs.double().diagonal().mean()
    metric = (vectors * values.clamp_min(0)) @ vectors.T
    smooth = (vectors / (values.clamp_min(0) + 1e-3)) @ vectors.T
    metric, smooth = metric.float(), smooth.float()
    q, k = model.weights(heads)
    free = {name: _mask(heads, name, q.device) for name in "qk"}
    for which in SCHEDULE:
        side = _QuerySide(model, targets, q, k) if which == "q" else _KeySide(model, targets, q, k)
        change = _solve(side, metric, smooth, free[which])
        q, k = (q + change, k) if which == "q" else (q, k + change)
    back = model.rotation.order(heads.head_dim).argsort()
    q, k = q[:, back], k[:, back]
    result = replace(heads, q=q[..., :-1].to(heads.q), k=k[..., :-1].to(heads.k))
    if heads.q_bias is not None:
        result.q_bias = q[..., -1].to(heads.q)
    if heads.k_bias is not None:
        result.k_bias = k[..., -1].to(heads.k)
    return result


def logit_error(model: LogitModel, targets: Sequence[LogitTargets], heads: Heads) -> float:
    """Root mean square error of the logits, weighted by the original's attention, without each row's mean."""
    q, k = model.weights(heads)
    lost, rows = 0.0, 0
    for batch in targets:
        gap = batch.scores - model.scores(model.states(batch.x, q, batch.rows), model.states(batch.x, k))
        lost += float((_weighted(batch.probabilities, gap) * gap).sum())
        rows += gap.shape[0] * gap.shape[1] * gap.shape[2]
    return (max(lost, 0.0) / max(rows, 1)) ** 0.5


def _mask(heads: Heads, name: str, device: torch.device) -> float | Tensor:
    """1 for what may change, 0 for the last column of a projection without a bias."""
    if getattr(heads, name + "_bias") is not None:
        return 1.0
    mask = torch.ones(heads.q.shape[-1] + 1, device=device)
    mask[-1] = 0.0
    return mask


def _weighted(probabilities: Tensor, gap: Tensor) -> Tensor:
    """Errors weighted so that their dot product with ``gap`` is its variance under the attention, row by row."""
    weighted = probabilities * gap
    return weighted.addcmul_(probabilities, weighted.sum(-1, keepdim=True), value=-1.0)


class _QuerySide:
    """The logits as a linear function of the query projections, with fixed keys."""

    def __init__(self, model: LogitModel, targets: Sequence[LogitTargets], q: Tensor, k: Tensor) -> None:
        self.model, self.targets, self.start = model, targets, q
        self.others = [model.states(batch.x, k) for batch in targets]

    def scores(self, index: int, change: Tensor) -> Tensor:
        batch = self.targets[index]
        return self.model.scores(self.model.states(batch.x, change, batch.rows), self.others[index])

    def gradient(self, index: int, error: Tensor) -> Tensor:
        batch = self.targets[index]
        return self.model.pull_queries(batch.x, batch.rows, error, self.others[index])


class _KeySide(_QuerySide):
    """The logits as a linear function of the key projections, with fixed queries."""

    def __init__(self, model: LogitModel, targets: Sequence[LogitTargets], q: Tensor, k: Tensor) -> None:
        self.model, self.targets, self.start = model, targets, k
        self.others = [model.states(batch.x, q, batch.rows) for batch in targets]

    def scores(self, index: int, change: Tensor) -> Tensor:
        return self.model.scores(self.others[index], self.model.states(self.targets[index].x, change))

    def gradient(self, index: int, error: Tensor) -> Tensor:
        return self.model.pull_keys(self.targets[index].x, error, self.others[index], len(self.start))


def _solve(side: _QuerySide, metric: Tensor, smooth: Tensor, free: float | Tensor) -> Tensor:
    """The change that minimises the weighted logit error plus the pull: preconditioned conjugate gradients."""

    def curvature(change: Tensor) -> Tensor:
        total = torch.zeros_like(change)
        for i, batch in enumerate(side.targets):
            total += side.gradient(i, _weighted(batch.probabilities, side.scores(i, change)))
        return total * free

    residual = torch.zeros_like(side.start)
    for i, batch in enumerate(side.targets):
        residual += side.gradient(i, _weighted(batch.probabilities, batch.scores - side.scores(i, side.start)))
    residual = residual * free
    step = (residual @ smooth) * free
    size = ((step @ metric) * step).sum()
    change = torch.zeros_like(step)
    if not bool(size > 0):
        return change
    pull = DAMPING * (step * curvature(step)).sum() / size
    search, power = step.clone(), (residual * step).sum()
    for _ in range(STEPS):
        bent = curvature(search) + pull * (search @ metric) * free
        bend = (search * bent).sum()
        if not bool(bend > 0) or not bool(power > 0):
            break
        length = power / bend
        change += length * search
        residual = residual - length * bent
        step = (residual @ smooth) * free
        power, last = (residual * step).sum(), power
        search = step + power / last * search
    return change
