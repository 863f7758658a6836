"""Losses on logits, a chunk of tokens at a time: the logits of all tokens are never there at once.

Loss and gradients are computed together in the forward pass, where a chunk's logits are at hand; backward only scales
them. So nothing is computed twice and what is kept for backward is the gradient of the hidden states and of the head's
parameters, not [tokens, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rehead.recipes.training.losses import fused
from rehead.recipes.training.losses.head import Head
from rehead.recipes.training.losses.registry import Objective
from rehead.recipes.training.losses.tokens import TokenBatch

# Bytes that one chunk's raw logits may take, by device: large products on a GPU, cache and memory on a CPU.
_LOGITS_BYTES = {"cuda": 384 << 20, "cpu": 32 << 20}
METRICS = ("kl", "cross_entropy", "top1_agreement")


class Sums(NamedTuple):
    """Sums over tokens.

    Attributes:
        loss: float32 scalar (float64 for a float64 model) with a gradient.
        metrics: detached scalars: ``cross_entropy`` and, with a teacher, ``kl`` (forward, temperature 1) and
            ``top1_agreement`` (tokens on which both have the same most likely token).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Side:
    """One model's part: input of its head [N, hidden], already in the dtype of the product, and the head."""

    hidden: Tensor
    head: Head


def chunk_size(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Tokens in a chunk, a multiple of 128 on a GPU, so that its raw logits stay within a budget by device."""
    budget = _LOGITS_BYTES.get(device.type, _LOGITS_BYTES["cpu"])
    least = 128 if device.type == "cuda" else 16
    return max(least, budget // (vocabulary * itemsize) // least * least)


def head_loss(
    student: Side, teacher: Side | None, labels: Tensor, objective: Objective, chunk: int | None = None
) -> Sums:
    """Sum of the objective's terms over tokens, differentiable in the student's hidden states and head.

    Args:
        student: hidden states [N, hidden] in bf16, fp16, fp32 or fp64; products run in that dtype, sums over tokens and
            softmaxes in float32 or wider. The head's parameters may be wider (master weights); their gradients are then
            gathered in float32.
        teacher: constants, or None.
        labels: int64 [N], all counted.
        objective: what is summed.
        chunk: tokens at a time; by default as many as :func:`chunk_size` says.
    """
    gradients = torch.is_grad_enabled()
    parameters: list[Tensor] = list(student.head.module.parameters())
    if student.head.linear:
        parameters = [p for p in (student.head.weight, student.head.bias) if p is not None]
    wanted = (
        gradients and student.hidden.requires_grad,
        tuple(gradients and parameter.requires_grad for parameter in parameters),
    )
    size = chunk or chunk_size(student.head.shape.vocabulary, student.hidden.element_size(), student.hidden.device)

    def compute(hidden: Tensor) -> _Taken:
        part = Side(hidden, student.head)
        function = _linear if student.head.linear else _through_module
        return function(part, teacher, labels, objective, size, parameters, wanted)

    loss, metrics = _TakenAtOnce.apply(compute, student.hidden, *parameters)
    names = METRICS if teacher is not None else METRICS[1:2]
    order = {name: index for index, name in enumerate(METRICS)}
    return Sums(loss, {name: metrics[order[name]] for name in names})


class _Taken(NamedTuple):
    """Loss and metrics with the gradients taken on the way; None where none was wanted."""

    loss: Tensor
    metrics: Tensor
    hidden: Tensor | None
    parameters: list[Tensor | None]


class _TakenAtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[Tensor], _Taken], hidden: Tensor, *parameters: Tensor):
        taken = compute(hidden)
        ctx.gradients = [taken.hidden, *taken.parameters]
        ctx.mark_non_differentiable(taken.metrics)
        return taken.loss, taken.metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss goes backward once; call it again to get its gradients again")
        # Scaled in place and let go of, so that autograd may take the buffers over as they are.
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream.to(gradient.dtype))
        return None, *gradients


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _metrics(batch: TokenBatch) -> list[Tensor]:
    """KL, cross-entropy and agreement summed over a chunk; KL and agreement 0 without a teacher."""
    student = batch.student_log_probs().detach()
    right = -student.gather(-1, batch.labels[:, None]).sum()
    if batch.teacher is None:
        return [torch.zeros_like(right), right, torch.zeros_like(right)]
    teacher = batch.teacher_log_probs()
    same = (student.argmax(-1) == teacher.argmax(-1)).sum().to(right.dtype)
    return [(teacher.exp() * (teacher - student)).sum(), right, same]


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def _teacher_raw(
    teacher: Side | None, rows: slice, product: Callable[[Tensor, Tensor], Tensor] = _product
) -> Tensor | None:
    if teacher is None:
        return None
    hidden, head = teacher.hidden[rows], teacher.head
    with torch.no_grad():
        return product(hidden, head.weight.to(hidden.dtype)) if head.linear else head.raw(hidden)


def _token_batch(
    raw: Tensor, teacher_raw: Tensor | None, teacher: Side | None, labels: Tensor, head: Head, objective: Objective
) -> TokenBatch:
    """Logits in float32 or wider out of raw ones that have their bias."""
    logits = head.shape.apply(raw.to(_wide(raw.dtype)))
    other = None
    if teacher is not None and teacher_raw is not None:
        other = teacher.head.shape.apply(teacher_raw.to(_wide(teacher_raw.dtype)).to(logits.dtype))
    return TokenBatch(logits, other, labels, objective.temperature, objective.mix)


def _evaluate(batch: TokenBatch, objective: Objective) -> Tensor:
    total = batch.student.new_zeros(())
    for weight, term in objective.weighted():
        total = total + weight * term.function(batch).sum()
    return total


def _linear(
    student: Side,
    teacher: Side | None,
    labels: Tensor,
    objective: Objective,
    size: int,
    parameters: list[Tensor],
    wanted: tuple[bool, tuple[bool, ...]],
) -> _Taken:
    """The head is a matrix: gradients by hand, the logits' gradient by the GPU kernel where there is one."""
    hidden, head = student.hidden, student.head
    weight, bias = head.weight.detach().to(hidden.dtype), head.bias
    wide = _wide(hidden.dtype)
    kinds = [hidden.dtype] if teacher is None else [hidden.dtype, teacher.hidden.dtype]
    quick = fused.unavailable(objective, hidden.device, *kinds) is None and (teacher is None or teacher.head.linear)
    any_wanted = wanted[0] or any(wanted[1])
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1][0] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[1][1] else None
    loss, metrics = hidden.new_zeros((), dtype=wide), hidden.new_zeros(len(METRICS), dtype=wide)
    other_bias = teacher.head.bias if teacher is not None and teacher.head.linear else None
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        part, targets = hidden[rows], labels[rows]
        product = fused.roomy_product if quick else _product
        raw, teacher_raw = product(part, weight), _teacher_raw(teacher, rows, product)
        if quick:
            shapes = (head.shape, None if teacher is None else teacher.head.shape)
            sums = fused.token_losses(raw, teacher_raw, targets, objective, shapes, (bias, other_bias), any_wanted).sum(
                1
            )
            loss, metrics, gradient = loss + sums[0], metrics + sums[1:], raw
        else:
            raw = raw.to(wide)
            if teacher_raw is not None and other_bias is not None:
                teacher_raw = teacher_raw.to(wide) + other_bias.to(wide)
            with torch.set_grad_enabled(any_wanted):
                leaf = raw.requires_grad_(any_wanted)
                biased = leaf if bias is None else leaf + bias.detach().to(wide)
                batch = _token_batch(biased, teacher_raw, teacher, targets, head, objective)
                total = _evaluate(batch, objective)
                gradient = torch.autograd.grad(total, leaf)[0].to(hidden.dtype) if any_wanted else raw
            loss, metrics = loss + total.detach(), metrics + torch.stack(_metrics(batch))
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _add_product(grad_weight, gradient, part)
        if grad_bias is not None:
            grad_bias += gradient.sum(0, dtype=wide)
    found = [grad_weight] if bias is None else [grad_weight, grad_bias]
    taken = [None if g is None else g.to(p.dtype) for g, p in zip(found, parameters)]
    return _Taken(loss, metrics, grad_hidden, taken)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, H] += gradient [N, V]^T hidden [N, H], summed in total's dtype whatever that of the factors."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, hidden)
    elif total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, gradient.T, hidden, total.dtype, out=total)
    else:
        total += (gradient.T @ hidden).to(total.dtype)


def _through_module(
    student: Side,
    teacher: Side | None,
    labels: Tensor,
    objective: Objective,
    size: int,
    parameters: list[Tensor],
    wanted: tuple[bool, tuple[bool, ...]],
) -> _Taken:
    """The head is some module: autograd through it, a chunk at a time."""
    hidden, head = student.hidden, student.head
    wide = _wide(hidden.dtype)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    totals: list[Tensor | None] = [
        torch.zeros_like(p, dtype=wide) if w else None for p, w in zip(parameters, wanted[1])
    ]
    chosen = [parameter for parameter, want in zip(parameters, wanted[1]) if want]
    loss, metrics = hidden.new_zeros((), dtype=wide), hidden.new_zeros(len(METRICS), dtype=wide)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        teacher_raw = _teacher_raw(teacher, rows)
        if teacher is not None and teacher.head.linear and teacher.head.bias is not None and teacher_raw is not None:
            teacher_raw = teacher_raw.to(wide) + teacher.head.bias.to(wide)
        with torch.set_grad_enabled(wanted[0] or bool(chosen)):
            leaf = hidden[rows].detach().requires_grad_(wanted[0])
            batch = _token_batch(head.raw(leaf), teacher_raw, teacher, labels[rows], head, objective)
            total = _evaluate(batch, objective)
            inputs = [leaf, *chosen] if wanted[0] else chosen
            found = list(torch.autograd.grad(total, inputs, allow_unused=True)) if inputs else []
        loss, metrics = loss + total.detach(), metrics + torch.stack(_metrics(batch))
        if grad_hidden is not None:
            grad_hidden[rows] = found.pop(0)
        for at, gradient in zip([t for t in totals if t is not None], found):
            if gradient is not None:
                at += gradient
    taken = [None if t is None else t.to(p.dtype) for t, p in zip(totals, parameters)]
    return _Taken(loss, metrics, grad_hidden, taken)
