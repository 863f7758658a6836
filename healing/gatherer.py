"""Gather the moments of one layer, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rehead.errors import UnsupportedError
from rehead.healing.moments import Batch, Moments, started
from rehead.lazy import late

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rehead.healing.rotation import Rotation
    from rehead.models.ranks import Ranks
    from rehead.models.watch import Seen
else:
    torch = late("torch")


class Gatherer:
    """Adds up the moments of one layer.

    Args:
        names: the moments to gather; ``inputs`` are always gathered too.
        groups: number of groups of neighbouring query heads.
        output: the layer's output projection [m, H, D].
        rotation: the layer's rotation, or None if unknown.

    Raises:
        UsageError: there is no moment of that name.
        UnsupportedError: a moment needs the rotation, which is unknown.
    """

    def __init__(self, names: Sequence[str], groups: int, output: Tensor, rotation: Rotation | None) -> None:
        self.sums = {name: started(name, groups) for name in dict.fromkeys(("inputs", *names))}
        blind = [name for name, part in self.sums.items() if part.rotates and rotation is None]
        if blind:
            raise UnsupportedError(
                f"{blind[0]}: cannot be gathered, as the model does not show how it rotates queries and keys; "
                "use a method that does not need it"
            )
        self.groups, self.output, self.rotation = groups, output, rotation
        self.tokens = self.length = 0

    @property
    def attends(self) -> bool:
        """Whether a moment needs attention."""
        return any(part.attends for part in self.sums.values())

    def add_inputs(self, x: Tensor) -> None:
        """Add a batch of inputs x~ [b, S, w]."""
        self.tokens += x.shape[0] * x.shape[1]
        self.length = max(self.length, x.shape[1])
        self._add(Batch(x, None, self.output, self.rotation))

    def add_attention(self, x: Tensor, seen: Seen) -> None:
        """Add what a batch's attention does with its inputs."""
        self._add(Batch(x, seen, self.output, self.rotation))

    def add_outputs(self, x: Tensor, heads: Tensor) -> None:
        """Add what a batch's output projection reads, [..., H D]."""
        self._add(Batch(x, None, self.output, self.rotation, heads))

    def _add(self, batch: Batch) -> None:
        shows = (batch.seen is not None, batch.heads is not None)
        for part in self.sums.values():
            if (part.attends, part.writes) == shows:
                part.add(batch)

    def share(self, ranks: Ranks) -> None:
        """Make the sums those of all processes; the main one must have seen whatever any has."""
        if ranks.world == 1:
            return
        mine: dict[str, Any] = {
            name: [list(part.total.shape), str(part.total.dtype).rpartition(".")[2], list(part.weight.shape)]
            for name, part in self.sums.items()
            if part.total is not None and part.weight is not None
        }
        for name, (shape, dtype, weights) in ranks.from_main(lambda: mine).items():
            part = self.sums[name]
            if part.total is None or part.weight is None:
                part.total = torch.zeros(shape, dtype=getattr(torch, dtype), device=ranks.device)
                part.weight = torch.zeros(weights, dtype=torch.float64)
            part.total, part.weight = ranks.sum(part.total), ranks.sum(part.weight)
        self.tokens = int(ranks.sum(torch.tensor(self.tokens)))
        self.length = ranks.agreed(self.length)

    def finish(self) -> Moments:
        """The moments. If attention could not be observed, plain ``inputs`` replace those weighted by it."""
        means, weights = {}, {}
        for name, part in self.sums.items():
            if part.weight is not None:
                means[name] = part.mean()
                if part.weight.ndim:
                    weights[name] = part.weight
            elif part.per == "group":
                means[name] = means["inputs"].expand(self.groups, -1, -1)
        angles = None if self.rotation is None else self.rotation.angles
        return Moments(means, weights, self.groups, angles, self.length, self.tokens)
