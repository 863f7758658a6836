"""Refit of queries and keys to the attention logits of the original layer, in closed form.

For fixed keys the attention logits are linear in the query projections, and for fixed queries in the key projections.
Both problems are solved by conjugate gradients on the true logits (with the true rotary angles), weighted by the
original's attention probabilities, without each row's mean, which softmax ignores. The targets are the original
layer's logits on its own activations; the inputs are those that the changed layers before really produce.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import Heads, augmented
from rehead.models.ranks import Ranks

#: Conjugate-gradient steps of one solve, and the order of the solves.
STEPS = 9
SCHEDULE = ("q", "k", "q")
#: Pull towards the start, relative to the problem's own curvature: directions that the text does not determine stay.
DAMPING = 1e-2
#: Random states that the curvature is probed with.
PROBES = 2
#: Parts into which a batch's queries are split; a GPU takes all at once, since it waits for launches, not for products.
PARTS = {"cpu": 8}


@dataclass(frozen=True)
class Shared:
    """A batch that processes share: its sequences in all, and the places among them of this process's, int64 [b]."""

    whole: int
    places: Tensor


@dataclass(frozen=True)
class Part:
    """The target logits of some neighbouring queries, for the keys that any of them attends to.

    Attributes:
        queries: which of the batch's R queries.
        keys: so many keys from the first on; no query of the part attends to a later one.
        probabilities, scores: as :meth:`LogitTargets.of` takes them, cut to these.
    """

    queries: slice
    keys: int
    probabilities: Tensor
    scores: Tensor


@dataclass
class LogitTargets:
    """Target logits of some queries of one batch.

    Attributes:
        x: inputs of the converted layer [b, S, w], with a last column of ones for biases; b may be 0 where processes
            share the batch.
        rows: positions of the R queries, int64 [R].
        parts: the targets, some queries each; none where b is 0.
        shared: how processes share the batch; None: this one has all of it.
    """

    x: Tensor
    rows: Tensor
    parts: list[Part]
    shared: Shared | None = None

    @classmethod
    def of(
        cls, x: Tensor, rows: Tensor, probabilities: Tensor, scores: Tensor, shared: Shared | None = None
    ) -> LogitTargets:
        """Targets in parts: a causal model's early queries read few keys, so that half of the products are not needed.

        Args:
            x, rows, shared: as above; b is not 0.
            probabilities: the original's attention probabilities for the queries [b, H, R, S].
            scores: the original's logits for them before masking [b, H, R, S].
        """
        every = range(len(rows))
        step = -(-len(rows) // PARTS.get(x.device.type, 1))
        if step == len(rows):  # one part has all
            return cls(x, rows, [Part(slice(None), x.shape[1], probabilities, scores)], shared)
        read = (probabilities > 0).flatten(0, 1).any(0)  # [R, S]
        last = (read * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1).tolist()
        parts = []
        for start in every[::step]:
            queries, keys = slice(start, start + step), max(1, *last[start : start + step])
            cut = (tensor[:, :, queries, :keys].contiguous() for tensor in (probabilities, scores))
            parts.append(Part(queries, keys, *cut))
        return cls(x, rows, parts, shared)


class LogitModel:
    """Attention logits as a function of the query and key projections, whose rows are in :meth:`Rotation.order`.

    Args:
        rotation: the model's rotary embedding.
        scaling: factor on the dot products.
        ranks: the processes that share the targets; None: this one has all of them.
    """

    def __init__(self, rotation: Rotation, scaling: float, ranks: Ranks | None = None) -> None:
        self.rotation, self.scaling = rotation, scaling
        self.ranks = ranks or Ranks(0, 1, rotation.factors.device)

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
        grouped = (queries * self.scaling).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # a group in one product
        return (grouped @ keys.transpose(-1, -2)).reshape(*queries.shape[:3], keys.shape[2])

    def pull_queries(self, rows: Tensor, error: Tensor, keys: Tensor) -> Tensor:
        """The adjoint of the logits in the queries before they are rotated: [b, H, R, D]."""
        grouped = error.unflatten(1, (keys.shape[1], -1)).flatten(2, 3) @ keys * self.scaling
        return self.rotation.turn(grouped.reshape(*error.shape[:3], -1), rows, inverse=True)

    def pull_keys(self, error: Tensor, queries: Tensor, kv: int) -> Tensor:
        """The adjoint of the logits in the keys before they are rotated: [b, kv, S, D]."""
        grouped = error.unflatten(1, (kv, -1)).flatten(2, 3).transpose(-1, -2)
        pulled = grouped @ queries.unflatten(1, (kv, -1)).flatten(2, 3) * self.scaling
        return self.rotation.turn(pulled, inverse=True)


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
        if not len(batch.x):
            continue
        queries, keys = model.states(batch.x, q, batch.rows), model.states(batch.x, k)
        for part in batch.parts:
            gap = part.scores - model.scores(queries[:, :, part.queries], keys[:, :, : part.keys])
            lost += float((_weighted(part.probabilities, gap) * gap).sum())
            rows += gap.shape[0] * gap.shape[1] * gap.shape[2]
    lost, rows = model.ranks.sum(torch.tensor([lost, rows], dtype=torch.float64)).tolist()
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

    def rows(self, index: int) -> Tensor | None:
        """Positions of the states that change; None for all."""
        return self.targets[index].rows

    def scores(self, index: int, states: Tensor) -> list[Tensor]:
        """Logits [b, H, r, s] of rotated states [b, heads, rows, D], for each part."""
        keys = self.others[index]
        return [self.model.scores(states[:, :, p.queries], keys[:, :, : p.keys]) for p in self.targets[index].parts]

    def pull(self, index: int, errors: Sequence[Tensor]) -> Tensor:
        """The adjoint of :meth:`scores` on errors under the attention: [b, heads, rows, D], not rotated."""
        batch, keys = self.targets[index], self.others[index]
        pulled = [
            self.model.pull_queries(batch.rows[part.queries], error, keys[:, :, : part.keys])
            for part, error in self._weighted(index, errors)
        ]
        return torch.cat(pulled, 2)

    def _weighted(self, index: int, errors: Sequence[Tensor]) -> Iterator[tuple[Part, Tensor]]:
        return ((p, _weighted(p.probabilities, error)) for p, error in zip(self.targets[index].parts, errors))

    def of(self, index: int, change: Tensor) -> list[Tensor]:
        """Logits of a change of the weights [heads, D, w], for each part."""
        return self.scores(index, self.model.states(self.targets[index].x, change, self.rows(index)))

    def gaps(self, index: int) -> list[Tensor]:
        """What the logits lack to the targets at the start, for each part."""
        return [p.scores - now for p, now in zip(self.targets[index].parts, self.of(index, self.start))]

    def gradient(self, index: int, errors: Sequence[Tensor]) -> Tensor:
        """The adjoint of :meth:`of` on errors under the attention: [heads, D, w]."""
        batch, rows = self.targets[index], self.rows(index)
        states = self.pull(index, errors).transpose(1, 2)  # [b, rows, heads, D]
        x = batch.x if rows is None else batch.x[:, rows]
        return (states.flatten(2).flatten(0, 1).T @ x.flatten(0, 1)).unflatten(0, self.start.shape[:2])

    def curvature(self) -> Tensor:
        """What a head's states do to the error on average, summed over rows: [heads, D, D], by random probes."""
        total = self.start.new_zeros(*self.start.shape[:2], self.start.shape[1])
        draw = torch.Generator(total.device).manual_seed(0)
        for index, batch in enumerate(self.targets):
            rows = self.rows(index)
            count = batch.x.shape[1] if rows is None else len(rows)
            whole = len(batch.x) if batch.shared is None else batch.shared.whole
            shape = (PROBES, whole, len(total), count, total.shape[1])
            drawn = torch.randint(0, 2, shape, generator=draw, device=total.device).mul_(2).sub_(1).to(total)
            if not len(batch.x):
                continue
            for signs in drawn if batch.shared is None else drawn[:, batch.shared.places.to(drawn.device)]:
                pulled = self.pull(index, self.scores(index, self.model.rotation.turn(signs, rows)))
                total += torch.einsum("bhrd,bhre->hde", pulled, signs) / PROBES
        self.model.ranks.sum(total)
        return (total + total.mT) / 2


class _KeySide(_QuerySide):
    """The logits as a linear function of the key projections, with fixed queries."""

    def __init__(self, model: LogitModel, targets: Sequence[LogitTargets], q: Tensor, k: Tensor) -> None:
        self.model, self.targets, self.start = model, targets, k
        self.others = [model.states(batch.x, q, batch.rows) for batch in targets]

    def rows(self, index: int) -> Tensor | None:
        return None

    def scores(self, index: int, states: Tensor) -> list[Tensor]:
        queries = self.others[index]
        return [self.model.scores(queries[:, :, p.queries], states[:, :, : p.keys]) for p in self.targets[index].parts]

    def pull(self, index: int, errors: Sequence[Tensor]) -> Tensor:
        batch, queries = self.targets[index], self.others[index]
        total = self.start.new_zeros(len(batch.x), len(self.start), batch.x.shape[1], self.start.shape[1])
        for part, error in self._weighted(index, errors):
            total[:, :, : part.keys] += self.model.pull_keys(error, queries[:, :, part.queries], len(self.start))
        return total


def _solve(side: _QuerySide, metric: Tensor, smooth: Tensor, free: float | Tensor) -> Tensor:
    """The change that minimises the weighted logit error plus the pull, by preconditioned conjugate gradients.

    The preconditioner takes the curvature as the product of what inputs do and what a head's states do (as K-FAC does,
    arXiv 1503.05671).

    Args:
        metric: second moment of the inputs, relative to the mean of its diagonal; smooth: its inverse, damped.
        free: 1 for the columns that may move, else 0.
    """

    def curvature(change: Tensor) -> Tensor:
        total = torch.zeros_like(change)
        for i in here:
            total += side.gradient(i, side.of(i, change))
        return ranks.sum(total) * free

    ranks, here = side.model.ranks, [i for i, batch in enumerate(side.targets) if len(batch.x)]
    residual = torch.zeros_like(side.start)
    for i in here:
        residual += side.gradient(i, side.gaps(i))
    residual = ranks.sum(residual) * free
    change = torch.zeros_like(residual)
    step = (residual @ smooth) * free
    length = ((step @ metric) * step).sum()
    if not bool(length > 0):
        return change
    bend, states = (step * curvature(step)).sum(), side.curvature()
    if not bool(bend > 0):
        return change
    pull = DAMPING * bend / length
    scale = bend / (states @ step @ metric * step).sum()  # makes it as large as what it stands for
    states = states * scale if 0 < float(scale) < math.inf else torch.zeros_like(states)
    values, vectors = torch.linalg.eigh(states.double())
    inverse = ((vectors / (values.clamp_min(0) + pull)[:, None]) @ vectors.mT).to(residual)  # [heads, D, D]
    step = (inverse @ (residual @ smooth)) * free
    search, power = step.clone(), (residual * step).sum()
    for _ in range(STEPS):
        bent = curvature(search) + pull * (search @ metric) * free
        bend = (search * bent).sum()
        if not ranks.agreed(bool(bend > 0) and bool(power > 0)):
            break
        length = power / bend
        change += length * search
        residual = residual - length * bent
        step = (inverse @ (residual @ smooth)) * free
        power, last = (residual * step).sum(), power
        search = step + power / last * search
    return change
