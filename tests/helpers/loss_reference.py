"""The same losses written out plainly, over whole logits, for autograd in float64; and small heads to try them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rehead.recipes.training.losses.chunked import Side
from rehead.recipes.training.losses.head import Head, Shape

LOSSES = ("kd", "ce", "js", "kd+0.1*ce", "0.7*kd+0.2*ce+2*js")


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """cap * tanh(scale * (h W^T + b) / cap)."""
    raw = hidden @ weight.T
    raw = (raw if bias is None else raw + bias) * scale
    return raw if cap is None else cap * torch.tanh(raw / cap)


def plain_loss(text: str, student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, mix: float):
    """Sum over tokens of a ``--loss`` over whole logits [N, vocabulary]; nothing of the package is used."""
    total = student.new_zeros(())
    s = torch.softmax(student / temperature, -1)
    t = None if teacher is None else torch.softmax(teacher / temperature, -1)
    for part in text.split("+"):
        weight, _, name = part.rpartition("*")
        if name == "ce":
            value = nn.functional.cross_entropy(student, labels, reduction="sum")
        elif name == "kd":
            value = temperature**2 * (t * (t.log() - s.log())).sum()
        elif name == "js":
            m = mix * t + (1 - mix) * s
            value = mix * (t * (t.log() - m.log())).sum() + (1 - mix) * (s * (s.log() - m.log())).sum()
            value = temperature**2 * value
        else:
            raise AssertionError(name)
        total = total + (float(weight) if weight else 1.0) * value
    return total


def head_side(
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
    weights: torch.dtype | None = None,
    bias: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
    padding: int = 0,
    size: float = 1.0,
) -> Side:
    """Random hidden states and a linear head with gradients; ``padding`` rows of the weight are no vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(width, vocabulary + padding, bias=bias)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * size / width**0.5)
        if bias:
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    return Side(hidden, Head(module.to(device, weights or dtype), Shape(vocabulary, scale, cap)))


def whole(side: Side) -> tuple[Tensor, list[Tensor]]:
    """Float64 logits [N, vocabulary] of a side and the leaves that they depend on: hidden, weight and bias."""
    head = side.head
    leaves = [side.hidden, head.weight] + ([] if head.bias is None else [head.bias])
    leaves = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    bias = leaves[2] if len(leaves) > 2 else None
    return logits_of(leaves[0], leaves[1], bias, head.shape.scale, head.shape.cap), leaves


def apart(got: Tensor, want: Tensor) -> float:
    """Relative distance by norms; NaN stays NaN."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm())
