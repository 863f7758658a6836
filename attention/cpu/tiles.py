"""One tile of attention, forward and backward, by PyTorch's flash CPU kernel or by explicit scores.

Shapes here are those of a *lane*: query ``[N, G, Sq, D]``, key and value ``[N, 1, Skv, D]`` where the G query heads of
a group read one KV head (broadcast by stride, never copied), or ``[N, G, Skv, D]`` where each head has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output ``[N, G, Sq, D]``, log-sum-exp ``[N, G, Sq]`` in float32, or float64 for float64) of one tile.

    ``hidden`` is a bool ``[N|1, G|1, Sq]`` that marks rows that see no key, or None if every row sees one.
    """
    group = query.shape[1]
    out, lse = _flash(
        query,
        key.expand(-1, group, -1, -1),
        value.expand(-1, group, -1, -1),
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    if hidden is not None:
        # The kernel returns a log-sum-exp of 0 for a row that sees no key; merging needs the true value, -inf.
        lse = lse.masked_fill(hidden, float("-inf"))
    return out, lse


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile, from the *merged* output and log-sum-exp of its rows.

    With the final log-sum-exp, exp(score - lse) is the final probability, so tiles need no rescaling and their
    gradients add up. Returns grad_query ``[N, G, Sq, D]`` and grad_key, grad_value shaped like key and value.
    """
    group = query.shape[1]
    grad_query, grad_key, grad_value = _flash_backward(
        grad_out,
        query,
        key.expand(-1, group, -1, -1),
        value.expand(-1, group, -1, -1),
        out,
        # Rows that see nothing: exp(score - inf) is 0.
        torch.where(lse == float("-inf"), float("inf"), lse),
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    if key.shape[1] != group:
        grad_key, grad_value = grad_key.sum(1, keepdim=True), grad_value.sum(1, keepdim=True)
    return grad_query, grad_key, grad_value


def _scores(
    query: Tensor, key: Tensor, scale: float, softcap: float | None, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Masked scores in at least float32, and the derivative of the soft cap where there is one."""
    work = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query.to(work), key.to(work).transpose(-1, -2)).mul_(scale)
    slope = None
    if softcap is not None:
        capped = torch.tanh_(scores.div_(softcap))
        slope = 1 - capped * capped
        scores = capped * softcap
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores = scores.masked_fill_(future, float("-inf"))
    if mask is not None:
        scores = scores + mask.to(work)
    return scores, slope


def math_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`flash_forward` with explicit scores, for options that the kernel lacks."""
    scores, _ = _scores(query, key, scale, softcap, mask, causal)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return torch.matmul(weights, value.to(weights.dtype)).to(query.dtype), lse


def math_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`flash_backward` with explicit scores; the fourth result is the gradient of the additive mask."""
    scores, slope = _scores(query, key, scale, softcap, mask, causal)
    work = scores.dtype
    weights = torch.exp(scores - torch.where(lse == float("-inf"), float("inf"), lse)[..., None])
    grad_out, value = grad_out.to(work), value.to(work)
    delta = (grad_out * out.to(work)).sum(-1, keepdim=True)
    grad_mask = weights * (torch.matmul(grad_out, value.transpose(-1, -2)) - delta)
    grad_scores = (grad_mask if slope is None else grad_mask * slope) * scale
    grad_query = torch.matmul(grad_scores, key.to(work))
    if key.shape[1] == query.shape[1]:
        grad_key = torch.matmul(grad_scores.transpose(-1, -2), query.to(work))
        grad_value = torch.matmul(weights.transpose(-1, -2), grad_out)
    else:
        # Summing over the group inside the product keeps the KV gradient at the size of the KV heads.
        grad_key = torch.einsum("ngqk,ngqd->nkd", grad_scores, query.to(work))[:, None]
        grad_value = torch.einsum("ngqk,ngqd->nkd", weights, grad_out)[:, None]
    return grad_query, grad_key, grad_value, grad_mask


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold a partial result into ``out`` ``[..., Sq, D]`` and ``lse`` ``[..., Sq]``, in place."""
    total = torch.logaddexp(lse, part_lse)
    old, new = torch.exp(lse - total), torch.exp(part_lse - total)
    dead = total == float("-inf")
    old, new = old.masked_fill_(dead, 0.0), new.masked_fill_(dead, 0.0)
    out.mul_(old[..., None]).add_(part.to(out.dtype) * new[..., None])
    lse.copy_(total)
