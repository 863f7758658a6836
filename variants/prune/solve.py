"""The closed form: which query heads a layer loses least by, and the output projection that makes up for them.

The layer's output is W z, with z all heads' outputs side by side and C = E[z z^T]. Without the heads S, the best W on
the others K predicts z_S from z_K by least squares: W_K + W_S C_SK C_KK^-1. The error is tr(W_S E_S W_S^T), where E_S
is what K leaves of C_SS (the Schur complement). Heads go one at a time, whichever costs least once the others make up
for it: the optimal brain surgeon with whole heads for weights (Hassibi and Stork 1992).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rehead.healing.moments import Batch, Moment, moment
from rehead.models.heads import Heads

OUTPUTS = "head_outputs"
RIDGE = 1e-5
"""Added to the diagonal of C, relative to its mean."""


@moment(OUTPUTS)
class HeadOutputs(Moment):
    """E[z z^T] over tokens, [H D, H D]: z is what the output projection reads, all heads' outputs side by side."""

    attends, writes = False, True

    def add(self, batch: Batch) -> None:
        assert batch.heads is not None
        self.see(batch.heads)

    def see(self, outputs: Tensor) -> None:
        """Add what an output projection reads, [..., H D]."""
        flat = outputs.flatten(0, -2).float()
        self.sums(flat.shape[1], flat.shape[1], like=flat).add_(flat.T @ flat)
        self.count(len(flat))


def least_needed(output: Tensor, gram: Tensor | None, kv: int, count: int) -> list[int]:
    """The query heads to drop, ``count`` of each KV head's group, ascending.

    Args:
        output: the output projection by head, [m, H, D].
        gram: E[z z^T], [H D, H D]; None to go by the size of each head's part of ``output``.
        kv: KV heads; each is read by as many neighbouring query heads.
        count: heads that go in each group, fewer than it has.
    """
    num, dim = output.shape[1:]
    size = num // kv
    if gram is None:
        norms = output.double().square().sum((0, 2)).unflatten(0, (kv, size))
        first = norms.argsort(dim=1, stable=True)[:, :count]
        return sorted((first + torch.arange(kv, device=first.device)[:, None] * size).flatten().tolist())
    weight, inverse = output.double().flatten(1), torch.linalg.inv(_damped(gram))
    dropped: list[int] = []
    while len(dropped) < kv * count:
        full = {group for group in range(kv) if sum(head // size == group for head in dropped) == count}
        best: tuple[float, int, Tensor] | None = None
        for head in range(num):
            if head in dropped or head // size in full:
                continue
            part = slice(head * dim, (head + 1) * dim)
            left = torch.linalg.inv(inverse[part, part])
            loss = float(((weight[:, part] @ left) * weight[:, part]).sum())
            if best is None or loss < best[0]:
                best = loss, head, left
        assert best is not None
        _, head, left = best
        part = slice(head * dim, (head + 1) * dim)
        step = left @ inverse[part]
        weight, inverse = weight - weight[:, part] @ step, inverse - inverse[:, part] @ step
        dropped.append(head)
    return sorted(dropped)


def predictor(gram: Tensor | None, dropped: Sequence[int], num: int, dim: int) -> Tensor:
    """R [H D, H D] with R z = z, but for the outputs of dropped heads: their prediction from those of the others.

    Without ``gram`` they are zero.
    """
    gone = torch.zeros(num, dtype=torch.bool)
    gone[list(dropped)] = True
    gone = gone.repeat_interleave(dim)
    if gram is None:
        return torch.diag((~gone).float())
    damped, gone = _damped(gram), gone.to(gram.device)
    result = torch.diag((~gone).double())
    kept = torch.linalg.solve(damped[~gone][:, ~gone], damped[~gone][:, gone]).T
    result[gone.nonzero(), (~gone).nonzero().T] = kept
    return result.float()


def without_heads(heads: Heads, dropped: Sequence[int], gram: Tensor | None) -> tuple[Heads, Tensor, float | None]:
    """A layer without some of its query heads, as many in each group.

    Args:
        heads: the layer; without ``gram`` in any dtype.
        dropped: from :func:`least_needed`.
        gram: E[z z^T]; None to leave the other heads as they are.

    Returns:
        (the layer, the old index of each head that is left, relative error of the output on the text of ``gram``).
    """
    num, dim = heads.o.shape[1:]
    order = torch.tensor([head for head in range(num) if head not in set(dropped)])
    if gram is None:
        return heads.permute_queries(order), order, None
    old = heads.o.double().flatten(1)
    new = old @ predictor(gram, dropped, num, dim).double()
    sizes = [float(((part @ gram.double()) * part).sum()) for part in (old - new, old)]
    error = max(sizes[0] / max(sizes[1], 1e-30), 0.0) ** 0.5
    return replace(heads, o=new.to(heads.o).unflatten(1, (num, dim))).permute_queries(order), order, error


def _damped(gram: Tensor) -> Tensor:
    gram = gram.double()
    return gram + RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), device=gram.device)
