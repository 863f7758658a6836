"""Moments: averages over the calibration text of what one layer's attention reads and computes, by name.

Closed forms ask for them by name. Each moment is a small class that adds up batches. A layer's moments are gathered
together, for the finest groups of neighbouring query heads that any user needs; those of coarser groups are weighted
means of them. x~ = [x, 1] is the attention's input with a last column of ones for biases, of width w = n + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rehead.lazy import late
from rehead.models.linalg import eigen, roots
from rehead.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rehead.healing.rotation import Rotation
    from rehead.models.watch import Seen
else:
    torch = late("torch")

T = TypeVar("T")

#: First tokens of a text, which attract attention regardless of content; left out of :class:`MeanRotation`.
SINKS = 4


@dataclass(frozen=True)
class Batch:
    """One batch of sequences at a layer.

    Attributes:
        x: x~ [b, S, w].
        seen: attention of some of the queries; None if only ``x`` is counted.
        output: the original's output projection [m, H, D].
        rotation: the layer's rotation, or None if unknown.
        heads: what the output projection reads, all heads' outputs side by side [..., H D]; None elsewhere.
    """

    x: Tensor
    seen: Seen | None
    output: Tensor
    rotation: Rotation | None
    heads: Tensor | None = None


class Moment:
    """Adds up one moment over batches. Subclasses set ``total`` and ``weight``; the mean is their quotient.

    Attributes:
        per: whether there is one mean per "layer", per "group" of query heads, or per query "head".
        attends: needs attention, which is observed for some of the queries only.
        rotates: needs the layer's rotation.
        writes: needs what the output projection reads, and nothing else.
    """

    per: Literal["layer", "group", "head"] = "layer"
    attends: bool = True
    writes: bool = False
    rotates: bool = False

    def __init__(self, groups: int, *numbers: int) -> None:
        self.groups = groups
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch to the sums."""
        raise NotImplementedError

    def sums(self, *shape: int, like: Tensor) -> Tensor:
        """The total so far, to add to in place; zeros of ``shape`` at first."""
        if self.total is None:
            self.total = like.new_zeros(shape)
        return self.total

    def count(self, weight: Tensor | float) -> None:
        """Add to the weight: a number, or one for each group or head [...]."""
        weight = torch.as_tensor(weight, dtype=torch.float64)
        self.weight = weight if self.weight is None else self.weight + weight

    def mean(self) -> Tensor:
        """The total by the weight, once anything has been added."""
        assert self.total is not None
        assert self.weight is not None
        weight = self.weight.reshape(*self.weight.shape, *[1] * (self.total.ndim - self.weight.ndim))
        return self.total / weight.to(self.total.device, self.total.real.dtype)


MOMENTS: Registry[type[Moment]] = Registry("moment", {})
"""Every moment by name. One that takes numbers is asked for with them: ``NAME:256:4``."""


def moment_class(name: str) -> type[Moment]:
    """The class of a moment, by the name that it is asked for."""
    return MOMENTS.get(name.partition(":")[0])


def started(name: str, groups: int) -> Moment:
    """A moment with nothing added up, by the name that it is asked for."""
    return moment_class(name)(groups, *map(int, name.split(":")[1:]))


def moment(name: str):
    """Register a subclass of :class:`Moment`.

    Raises:
        ValueError: the name is taken.
    """

    def add(kind: type[Moment]) -> type[Moment]:
        MOMENTS.add(name, kind)
        return kind

    return add


@moment("inputs")
class Inputs(Moment):
    """E[x~ x~^T] over tokens, [w, w]: the inputs as queries see them."""

    attends = False

    def add(self, batch: Batch) -> None:
        flat = batch.x.flatten(0, -2)
        width = flat.shape[1]
        self.sums(width, width, like=flat).add_(flat.T @ flat)
        self.count(len(flat))


@moment("key_inputs")
class KeyInputs(Moment):
    """E[x~ x~^T] with each token weighted by the attention that a group's queries pay to it, [G, w, w].

    An error in a key that no query attends to costs nothing.
    """

    per = "group"

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        _add_weighted(self, batch.x, batch.seen.probabilities)
        self.count(_rows_of_a_group(batch.seen.probabilities, self.groups))


@moment("mixed_inputs")
class MixedInputs(Moment):
    """E[z z^T] with z = sum_j p_j x~_j, [G, w, w]: the inputs mixed by attention, as values are used."""

    per = "group"

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        p, width = batch.seen.probabilities, batch.x.shape[-1]
        total = self.sums(self.groups, width, width, like=batch.x)
        for head, attention in enumerate(p.unbind(1)):
            mixed = (attention @ batch.x).flatten(0, -2)
            total[head * self.groups // p.shape[1]] += mixed.T @ mixed
        self.count(_rows_of_a_group(p, self.groups))


@moment("squared_inputs")
class SquaredInputs(Moment):
    """E[x~ x~^T] with each token weighted by the squared attention that a group's queries pay to it, [G, w, w].

    The squared output error from independent errors of keys or values is proportional to the squared attention.
    """

    per = "group"

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        self.count(_add_weighted(self, batch.x, batch.seen.probabilities.square()).double().cpu())


@moment("query_energy")
class QueryEnergy(Moment):
    """E|q_hf|^2 of each rotary pair of each query head, after norm and rotation, [H, P].

    It tells how much an error in the same pair of a key counts.
    """

    per = "head"
    rotates = True

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        assert batch.rotation is not None
        queries = batch.seen.queries.float()
        energy = queries[..., batch.rotation.pairs].square().sum(-1)  # [b, H, R, P]
        self.sums(*energy.shape[1::2], like=energy).add_(energy.sum((0, 2)))
        self.count(queries.shape[0] * queries.shape[2])


@moment("value_spread")
class ValueSpread(Moment):
    """sum a^2 |W_o (v_j - o_i)|^2 / sum a^2 over queries i and keys j, with attention a, [H].

    An error ds of a score moves the output by a ds W_o (v_j - o_i), so this turns errors of scores into errors of the
    output.
    """

    per = "head"

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        p, values = batch.seen.probabilities, batch.seen.values.float()
        kv = values.shape[1]
        squared, grouped = p.square(), p.unflatten(1, (kv, -1))
        mixed = (grouped @ values[:, :, None]).flatten(1, 2)  # [b, H, R, D]
        metric = torch.einsum("mhd,mhe->hde", batch.output, batch.output)
        readers = values.repeat_interleave(p.shape[1] // kv, 1)
        of_keys = torch.einsum("bhsd,hde,bhse->bhs", readers, metric, readers)
        of_mixed = torch.einsum("bhrd,hde,bhre->bhr", mixed, metric, mixed)
        cross = (mixed @ metric) @ readers.transpose(-1, -2)
        gap = (of_keys[:, :, None] - 2 * cross + of_mixed[..., None]).clamp_min(0)
        self.sums(p.shape[1], like=gap).add_((squared * gap).sum((0, 2, 3)))
        self.count(squared.sum((0, 2, 3)).cpu())


@moment("mean_rotation")
class MeanRotation(Moment):
    """sum a^2 exp(i theta_f (i - j)) / sum a^2 over queries i and keys j after the first :data:`SINKS`, complex [H, P].

    It is the mean rotation of each rotary pair between a query and the keys that it attends to.
    """

    per = "head"
    rotates = True

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        assert batch.rotation is not None
        squared = batch.seen.probabilities.square()[..., SINKS:]
        turns = batch.rotation.factors / batch.rotation.factors.abs().clamp_min(1e-12)
        keys = torch.view_as_real(turns[SINKS : batch.x.shape[1]].conj_physical()).flatten(1)  # [S, 2P]
        reached = torch.view_as_complex((squared @ keys).unflatten(-1, (-1, 2)))  # [b, H, R, P]
        total = (reached * turns[batch.seen.rows]).sum((0, 2))
        self.sums(*total.shape, like=total).add_(total)
        self.count(squared.sum((0, 2, 3)).cpu())


def _add_weighted(moment: Moment, x: Tensor, attention: Tensor) -> Tensor:
    """Add x x^T of every token, weighted by its attention [b, H, R, S] from a group's queries; returns weights [G]."""
    flat, groups, weights = x.flatten(0, -2), attention.chunk(moment.groups, 1), []
    total = moment.sums(moment.groups, x.shape[-1], x.shape[-1], like=x)
    for group, rows in enumerate(groups):
        weight = rows.sum((1, 2)).reshape(-1, 1)
        total[group] += flat.T @ (flat * weight)
        weights.append(weight.sum())
    return torch.stack(weights)


def _rows_of_a_group(attention: Tensor, groups: int) -> int:
    """Number of rows of attention [b, H, R, S] per group of heads."""
    return attention.shape[0] * attention.shape[2] * (attention.shape[1] // groups)


@dataclass
class Moments:
    """The moments of one layer.

    Attributes:
        means: the moments by name, of the shapes that each :class:`Moment` says.
        weights: weights of groups and heads when groups are merged, float64 [G, ...] or [H, ...]; equal if left out.
        groups: number of groups of neighbouring query heads in moments "per group".
        angles: radians per token that each rotary pair turns, [P]; None if unknown.
        length: tokens in the longest calibration sequence.
        tokens: tokens counted.
    """

    means: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    groups: int = 1
    angles: Tensor | None = None
    length: int = 1
    tokens: int = 0
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.means[name]

    @property
    def inputs(self) -> Tensor:
        """:class:`Inputs`, [w, w]."""
        return self.means["inputs"]

    @property
    def input_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``inputs``, float64."""
        return self.once("input_eigen", lambda: eigen(self.inputs))

    @property
    def input_roots(self) -> tuple[Tensor, Tensor]:
        """Square root of ``inputs`` and its inverse, float64 [w, w]; see :func:`~rehead.models.linalg.sqrt_pair`."""
        return self.once("input_roots", lambda: roots(*self.input_eigen))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, computed once for these moments in all groupings, on which it must not depend."""
        if name not in self._kept:
            self._kept[name] = compute()
        kept: T = self._kept[name]
        return kept

    def of_inputs(self) -> Moments:
        """The inputs' alone; those of groups can be gigabytes."""
        return replace(self, means={"inputs": self.inputs}, weights={})

    def slow_pairs(self, turn: float) -> Tensor:
        """Which pairs turn by less than ``turn`` radians over a calibration sequence: bool [P]."""
        if self.angles is None:
            return torch.zeros(0, dtype=torch.bool)
        return self.angles.abs() * self.length < turn

    def merged(self, groups: Sequence[Sequence[int]]) -> Moments:
        """The moments of coarser groups.

        Args:
            groups: the present groups in each new group, equally many; query heads are reordered accordingly, and those
                of groups in none are left out.
        """
        flat = [member for group in groups for member in group]
        if len(groups) == self.groups and flat == list(range(self.groups)):
            return self
        means, weights = dict(self.means), dict(self.weights)
        for name in means:
            per = moment_class(name).per
            if per == "group":
                means[name], weights[name] = self._merged(name, groups)
            elif per == "head":
                parts = [part.unflatten(0, (self.groups, -1)) for part in (means[name], self._weight(name))]
                means[name], weights[name] = (part[flat].flatten(0, 1) for part in parts)
        return replace(self, means=means, weights=weights, groups=len(groups))

    def _weight(self, name: str) -> Tensor:
        mean = self.means[name]
        weight = self.weights.get(name)
        return torch.ones(len(mean), dtype=torch.float64) if weight is None else weight

    def _merged(self, name: str, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        mean, weight = self.means[name], self._weight(name)
        share = weight.tolist()
        merged = [sum(mean[i] * share[i] for i in group) / sum(share[i] for i in group) for group in groups]
        return torch.stack(merged), torch.stack([weight[list(group)].sum() for group in groups])
