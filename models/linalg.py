"""Linear algebra shared by the methods, in float64, since the matrices are badly conditioned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rehead.lazy import late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")


@contextmanager
def fast_products(wanted: bool = True) -> Iterator[None]:
    """Products of float32 matrices on a GPU read 11 of their 24 bits (TF32), several times as fast.

    For what is noisier than that rounding: a fit's gradients, and layers whose weights have 8 or 11 bits.
    """
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sqrt_pair(matrix: Tensor, damping: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive semi-definite matrix and the root's inverse.

    Args:
        matrix: [n, n].
        damping: added to the eigenvalues, as a share of the largest; the two results stay exact inverses.

    Returns:
        (root, inverse root), float64 [n, n], both symmetric.
    """
    return roots(*eigen(matrix), damping)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of the symmetric part of a matrix, float64."""
    sym = matrix.double()
    values, vectors = torch.linalg.eigh((sym + sym.T) / 2)
    return values, vectors


def roots(values: Tensor, vectors: Tensor, damping: float = 1e-6) -> tuple[Tensor, Tensor]:
    """As :func:`sqrt_pair`, from the eigenvalues and eigenvectors of :func:`eigen`."""
    top = values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    values = values.clamp_min(0) + damping * top
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def top_rows(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading right singular vectors of M, given M^T M: float64 [rank, n], orthonormal rows.

    If ``rank`` > n, the rows beyond n are zero.
    """
    _, vectors = torch.linalg.eigh(gram)
    rows = vectors[:, -rank:].flip(1).T
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Refactor ``left @ right`` so that both factors have the same singular values.

    The product X D Y^T is never formed: two thin QR decompositions reduce the SVD to [d, d]. A factorisation is fixed
    only up to an invertible matrix between the factors. Balanced factors train well; training diverges where one of
    them has all of a covariance's condition number.

    Args:
        left: [..., m, d]; right: [..., d, n].

    Returns:
        (X sqrt(D), sqrt(D) Y^T), [..., m, d] and [..., d, n]: zero beyond the rank where m or n is less than d.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    # A GPU takes far longer than a CPU for matrices as small as a head.
    x, d, yt = (part.to(left) for part in torch.linalg.svd((r_left @ r_right.mT).cpu(), full_matrices=False))
    x, y = q_left @ (x * d.sqrt()[..., None, :]), d.sqrt()[..., None] * (yt @ q_right.mT)
    short = left.shape[-1] - d.shape[-1]
    return torch.nn.functional.pad(x, (0, short)), torch.nn.functional.pad(y, (0, 0, 0, short))


def ridge(gram: Tensor, cross: Tensor, prior: Tensor, strength: float) -> Tensor:
    """Least squares pulled towards a prior: argmin_W sum |W z - y|^2 + strength * mean(diag gram) * |W - prior|^2.

    Args:
        gram: sum of z z^T, [m, m].
        cross: sum of y z^T, [out, m].
        prior: [out, m]; W stays here in directions that the data do not determine.
        strength: relative to the mean diagonal of ``gram``.

    Returns:
        [out, m], float64.
    """
    gram, cross, prior = gram.double(), cross.double(), prior.double()
    pull = strength * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + pull * eye, (cross + pull * prior).T).T


def nearest_rotation(cross: Tensor) -> Tensor:
    """The orthogonal R that maximises trace(R^T cross) (orthogonal Procrustes, Schoenemann 1966)."""
    u, _, vh = torch.linalg.svd(cross)
    return u @ vh
