"""Launches the fused loss kernel; :func:`unavailable` says why a loss could not run through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rehead.attention.kernels import unavailable as device_unavailable
from rehead.recipes.training.losses.registry import Objective

if TYPE_CHECKING:
    from rehead.recipes.training.losses.head import Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS = 16
WEIGHTS = ("cross_entropy", "forward", "js")


def unavailable(objective: Objective, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernel cannot compute these losses there (one line), or None when it can."""
    for _, term in objective.weighted():
        if term.fused not in WEIGHTS:
            return f"{term.name} has no kernel"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of bfloat16, float16, float32"
    return device_unavailable(device)


def roomy_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T``, [N, vocabulary], in rows that have room for a multiple of 16 columns.

    Rows of an odd vocabulary would begin at odd addresses, and neither matrix products nor the kernel read those well.
    """
    vocabulary = weight.shape[0]
    if vocabulary % _COLUMNS == 0:
        return hidden @ weight.T
    room = hidden.new_empty(len(hidden), -(-vocabulary // _COLUMNS) * _COLUMNS)[:, :vocabulary]
    return torch.mm(hidden, weight.T, out=room)


def _room(logits: Tensor) -> int:
    """Columns that every row owns, the last one too: a whole number of sixteens where there is room for it."""
    vocabulary = logits.shape[1]
    wide = -(-vocabulary // _COLUMNS) * _COLUMNS
    end = logits.storage_offset() + len(logits) * logits.stride(0)
    owned = logits.stride(0) >= wide and end <= logits.untyped_storage().nbytes() // logits.element_size()
    return wide if owned else vocabulary


def warps(extras: Iterable[bool]) -> int:
    """Warps of a program: more of them where it does more than the plain losses, so that no register is spilled."""
    return 16 if any(extras) else 8


def token_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    objective: Objective,
    shapes: tuple[Shape, Shape | None],
    biases: tuple[Tensor | None, Tensor | None],
    gradient: bool,
) -> Tensor:
    """Losses of a chunk of tokens; with ``gradient`` the student's logits are overwritten with their gradient.

    Args:
        student: raw logits [N, vocabulary], before bias, scale and soft cap, best as :func:`roomy_product` makes them.
        teacher: the teacher's, or None.
        labels: int64 [N].
        objective: its terms, all of which must have a kernel.
        shapes: scale and soft cap of student and teacher.
        biases: [vocabulary] each, or None.
        gradient: of the summed loss with respect to the raw logits.

    Returns:
        float32 [4, N]: weighted loss, KL(teacher || student), cross-entropy, 1 where both have the same top token.
    """
    import triton

    from rehead.recipes.training.losses import kernels

    weights = dict.fromkeys(WEIGHTS, 0.0)
    for weight, term in objective.weighted():
        weights[str(term.fused)] += weight
    tokens, vocabulary = student.shape
    width = min(_room(logits) for logits in (student, teacher) if logits is not None)
    rows = torch.empty(4, tokens, dtype=torch.float32, device=student.device)
    if tokens == 0:
        return rows
    shape, other = shapes
    bias, other_bias = (None if item is None else item.contiguous() for item in biases)
    labels = labels.contiguous()
    scale, cap = (1.0, None) if other is None else (other.scale, other.cap)
    # Small blocks in the interpreter, so that small vocabularies still cross their borders.
    block = 64 if triton.knobs.runtime.interpret else min(4096, max(16, triton.next_power_of_2(vocabulary)))
    flags = {
        "TEMPERED": objective.temperature != 1, "JS": weights["js"] != 0,
        "STUDENT_BIAS": bias is not None, "STUDENT_CAP": shape.cap is not None,
        "TEACHER_BIAS": other_bias is not None, "TEACHER_CAP": cap is not None,
    }  # fmt: skip
    with torch.cuda.device_of(student):
        kernels.token_losses[(tokens,)](
            student, student if teacher is None else teacher, labels, rows,
            student if bias is None else bias, student if other_bias is None else other_bias,
            student.stride(0), 0 if teacher is None else teacher.stride(0), tokens, vocabulary, width,
            float(shape.scale), float(shape.cap or 1.0), float(scale), float(cap or 1.0),
            1.0 / objective.temperature, float(objective.mix),
            weights["cross_entropy"], weights["forward"], weights["js"],
            TEACHER=teacher is not None, GRADIENT=gradient, **flags, BLOCK=block, num_warps=warps(flags.values()),
        )  # fmt: skip
    return rows
