"""Norms as data: what is learned in one, and how it folds into the matrices that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NormKind:
    """How a norm computes: ``n(x) * (weight + offset) + bias``, where n subtracts the mean if it is ``centred``.

    Attributes:
        centred: LayerNorm rather than RMSNorm (arXiv 1910.07467).
        offset: 1.0 where the stored weight is a deviation from one (Gemma), else 0.0.
        eps: added to the variance or the mean square.
    """

    centred: bool
    offset: float
    eps: float

    def normalise(self, x: Tensor) -> Tensor:
        """The norm without what is learned; in the dtype of ``x``, computed in float32 at least."""
        size = (x.shape[-1],)
        return F.layer_norm(x, size, eps=self.eps) if self.centred else F.rms_norm(x, size, eps=self.eps)

    def same_statistics(self, other: NormKind) -> bool:
        """Whether one normalised input serves both norms."""
        return self.centred == other.centred and self.eps == other.eps


def norm_kind(norm: nn.Module, size: int) -> NormKind | None:
    """Which kind a module is, by comparing what it computes with every kind; None if it is none of them.

    The comparison runs on copies in float64, with inputs small enough for a wrong eps to show.

    Args:
        norm: a module over the last dimension.
        size: of that dimension.
    """
    weight, bias = norm_parameters(norm)
    named = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    # Where it is written into the code, it is PyTorch's default; the comparison says if it is not.
    eps = next((value for value in named if isinstance(value, float) and value > 0), 1e-5)
    if weight is not None and weight.shape != (size,):
        return None
    device = weight.device if weight is not None else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator).to(device)
    x = torch.cat([x + 0.5, x * (float(eps) ** 0.5)])
    with torch.no_grad():
        dtype = weight.dtype if weight is not None else torch.float32
        want = norm(x.to(dtype)).double()
        x = x.to(dtype).double()
        for centred in (False, True):
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                kind = NormKind(centred, offset, float(eps))
                got = kind.normalise(x)
                if weight is not None:
                    got = got * (weight.double() + offset)
                if bias is not None:
                    got = got + bias.double()
                limit = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
                if float((got - want).norm()) <= limit * float(want.norm()):
                    return kind
    return None


def norm_parameters(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A norm's learned weight and bias, each of shape ``[hidden_size]``."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def fold(
    matrix: Tensor, matrix_bias: Tensor | None, kind: NormKind, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A matrix that reads the bare normalised input in place of the norm's output.

    ``W (w n + b) + c = (W diag(w)) n + (W b + c)``, in float64, rounded once.

    Args:
        matrix: ``[out, hidden_size]``.
        matrix_bias: ``[out]`` or None.
        kind: of the norm.
        weight, bias: the norm's, ``[hidden_size]`` or None.

    Returns:
        (matrix, bias) in the dtype of ``matrix``.
    """
    wide = matrix.double()
    folded = wide if weight is None else wide * (weight.double() + kind.offset)
    shift = None if matrix_bias is None else matrix_bias.double()
    if bias is not None:
        moved = wide @ bias.double()
        shift = moved if shift is None else shift + moved
    return folded.to(matrix.dtype), None if shift is None else shift.to(matrix.dtype)
