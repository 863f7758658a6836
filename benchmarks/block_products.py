"""The products of a transformer block under tensor parallelism, with the collectives that they need.

The rows of an input matrix and the columns of an output matrix are split over ranks (Megatron-LM, arXiv 1909.08053). An
output product ends in an all-reduce; the gradient of an input product's input needs another. Two ways to hide them are
in reach of a single product, and both forms of a block get both: the gradient's all-reduce runs while the weight's
gradient is computed, and an output product made in parts has one part's all-reduce run under the next part's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Ranks:
    """Who takes part, and how the collectives are done.

    Attributes:
        size: ranks that the block is split over.
        index: this one.
        group: of ``torch.distributed``, or None for one rank.
        parts: an output product is made in this many parts; 1 does not overlap anything, nor does the backward pass.
        symmetric: a buffer in memory that the peers can read, for small one-shot all-reduces without gradient.
    """

    size: int = 1
    index: int = 0
    group: Any = None
    parts: int = 1
    symmetric: Tensor | None = None

    def all_reduce(self, tensor: Tensor, wait: bool = True) -> Any:
        """Sum over ranks, in place; a handle to wait on unless ``wait``."""
        return dist.all_reduce(tensor, group=self.group, async_op=not wait)


Rows = Sequence[tuple[int, int, int]]


class _Inputs(torch.autograd.Function):
    """``x W_i^T`` for several matrices that read the same ``x [tokens, n]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, replicated: Rows, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.ranks, ctx.replicated = ranks, replicated
        return tuple(x @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            grad_x.addmm_(grad, weight)
        pending = None
        if ranks.size > 1:
            pending = ranks.all_reduce(grad_x, wait=ranks.parts == 1)
        grad_weights = [grad.T @ x for grad in grads]
        if ranks.size > 1:
            # Every rank has these rows (a KV head that is not split), but saw only its own query heads' share.
            for matrix, start, end in ctx.replicated:
                ranks.all_reduce(grad_weights[matrix][start:end])
        if pending is not None:
            pending.wait()
        return (grad_x, None, None, *grad_weights)


class _Outputs(torch.autograd.Function):
    """``sum_i x_i W_i^T``, summed over ranks; ``x_i [tokens, k_i]``, ``W_i [n, k_i]``."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *pairs: Tensor) -> Tensor:
        inputs, weights = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        ctx.save_for_backward(*pairs)
        if ranks.size == 1 or ranks.parts == 1:
            out = inputs[0] @ weights[0].T
            for x, weight in zip(inputs[1:], weights[1:]):
                out.addmm_(x, weight.T)
            if ranks.size > 1:
                ranks.all_reduce(out)
            return out
        out = inputs[0].new_empty(inputs[0].shape[0], weights[0].shape[0])
        pending = []
        pieces = zip(out.chunk(ranks.parts), *(x.chunk(ranks.parts) for x in inputs))
        for piece, *parts in pieces:
            torch.mm(parts[0], weights[0].T, out=piece)
            for x, weight in zip(parts[1:], weights[1:]):
                piece.addmm_(x, weight.T)
            pending.append(ranks.all_reduce(piece, wait=False))
        for work in pending:
            work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        pairs = ctx.saved_tensors
        inputs, weights = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        return (None, *(grad @ weight for weight in weights), *(grad.T @ x for x in inputs))


def input_products(x: Tensor, weights: Sequence[Tensor], ranks: Ranks, replicated: Rows = ()) -> tuple[Tensor, ...]:
    """``x W_i^T`` for each matrix, with one gradient all-reduce for all of them.

    Args:
        x: ``[B, S, n]``, the same on every rank.
        weights: this rank's rows, ``[out_i, n]``.
        ranks: who takes part.
        replicated: rows that every rank holds, as (matrix, from, to).
    """
    outs = _Inputs.apply(x.view(-1, x.shape[-1]), ranks, replicated, *weights)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def output_products(inputs: Sequence[Tensor], weights: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """``sum_i x_i W_i^T`` summed over ranks, with one all-reduce; ``x_i [B, S, k_i]``, ``W_i [n, k_i]``."""
    shape = (*inputs[0].shape[:-1], weights[0].shape[0])
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    if ranks.symmetric is not None and not torch.is_grad_enabled():
        return _one_shot(flat, weights, ranks).view(shape)
    return _Outputs.apply(ranks, *flat, *weights).view(shape)


def _one_shot(inputs: Sequence[Tensor], weights: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The product written into peer-readable memory, and every rank summing what all of them wrote."""
    assert ranks.symmetric is not None
    rows, width = inputs[0].shape[0], weights[0].shape[0]
    out = ranks.symmetric[: rows * width].view(rows, width)
    torch.mm(inputs[0], weights[0].T, out=out)
    for x, weight in zip(inputs[1:], weights[1:]):
        out.addmm_(x, weight.T)
    return _sum_peers(out, ranks)


def _sum_peers(out: Tensor, ranks: Ranks) -> Tensor:
    return torch.ops.symm_mem.one_shot_all_reduce(out, "sum", ranks.group.group_name)


def sum_over_ranks(first: Tensor, second: Tensor, ranks: Ranks) -> Tensor:
    """``first + second``, both ``[B, S, n]``, summed over ranks; without a gradient if there are several."""
    if ranks.size == 1:
        return first + second
    if ranks.symmetric is not None:
        out = ranks.symmetric[: first.numel()].view(first.shape)
        return _sum_peers(torch.add(first, second, out=out), ranks)
    total = first + second
    ranks.all_reduce(total)
    return total
