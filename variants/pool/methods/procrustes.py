"""Procrustes: rotate the heads of a group onto each other before averaging (arXiv 2412.20677), without data.

Rotations are those that the model cannot see: one angle for each rotary pair of the keys, any rotation over dimensions
without RoPE and over the values; queries and the output projection turn with them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.lazy import late
from rehead.models.freedom import KeyFreedom, key_freedom
from rehead.models.heads import Heads
from rehead.models.linalg import nearest_rotation
from rehead.variants.pool.methods.mean import mean
from rehead.variants.pool.methods.registry import MethodContext, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

# Alternating between the rotations and the mean converges fast; the last rounds no longer move anything.
_ROUNDS = 12


@register("procrustes", "rotate a group's heads onto each other, then average; needs no data (arXiv 2412.20677)")
def procrustes(heads: Heads, kv: int, context: MethodContext) -> Heads:
    """Align every group's key and value heads by rotations and average them.

    Norm weights are averaged; where a key norm forbids a rotation, that pair is averaged as it is.
    """
    freedom, size = key_freedom(heads), heads.num_kv_heads // kv
    keys = _with_bias(heads.k.double(), heads.k_bias)
    values = _with_bias(heads.v.double(), heads.v_bias)
    # What is averaged is what the norm lets through: rows times the norm's weight stay in step when both are averaged.
    key_turns = torch.stack([_key_turn(keys[g], freedom, heads) for g in _groups(len(keys), size)]).flatten(0, 1)
    if heads.fixed_values:
        value_turns = torch.eye(heads.head_dim, dtype=values.dtype, device=values.device).expand(len(values), -1, -1)
    else:
        value_turns = torch.stack([align(values[g]) for g in _groups(len(values), size)]).flatten(0, 1)
    return mean(turned(heads, key_turns, value_turns), kv, context)


def turned(
    heads: Heads, keys: Tensor, values: Tensor, queries: Tensor | None = None, outputs: Tensor | None = None
) -> Heads:
    """Apply a change of basis to every KV head and undo it in the queries and the output projection.

    Args:
        keys: [K, D, D] (k -> T k).
        values: [K, D, D] (v -> T v).
        queries: [K, D, D], the transposed inverse of ``keys``; ``keys`` itself, which are orthogonal, if None.
        outputs: [K, D, D], the transposed inverse of ``values``, likewise (o -> o S^T).
    """
    group = heads.group_size
    keys, values = keys.to(heads.k.device), values.to(heads.v.device)
    for_q = (keys if queries is None else queries.to(keys)).repeat_interleave(group, 0)
    for_o = (values if outputs is None else outputs.to(values)).repeat_interleave(group, 0)

    def turn(matrix: Tensor, weight: Any) -> Any:
        return None if weight is None else torch.einsum("hij,hj...->hi...", matrix, weight.double()).to(weight)

    return replace(
        heads,
        q=turn(for_q, heads.q),
        q_bias=turn(for_q, heads.q_bias),
        k=turn(keys, heads.k),
        k_bias=turn(keys, heads.k_bias),
        v=turn(values, heads.v),
        v_bias=turn(values, heads.v_bias),
        o=torch.einsum("mhj,hij->mhi", heads.o.double(), for_o).to(heads.o),
    )


def _groups(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias.double()[..., None]], -1)


def align(rows: Tensor) -> Tensor:
    """Rotations [G, D, D] that bring G matrices [G, D, n] as near to their common mean as rotations can."""
    # Onto the first head first: the plain mean of heads in different bases may be next to nothing.
    turns = torch.stack([nearest_rotation(rows[0] @ other.T) for other in rows])
    for _ in range(_ROUNDS):
        centre = (turns @ rows).mean(0)
        turns = torch.stack([nearest_rotation(centre @ other.T) for other in rows])
    return turns


def _key_turn(rows: Tensor, freedom: KeyFreedom, heads: Heads) -> Tensor:
    """Rotations [G, D, D] for a group's keys [G, D, n]: an angle for each free pair, a rotation over the rest."""
    turns = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device).repeat(len(rows), 1, 1)
    rest = heads.free_dims().to(rows.device)
    if len(rest) and freedom.rest != "none":
        block = align(rows[:, rest])
        turns[:, rest[:, None], rest[None, :]] = block
    if heads.pairs is None or not freedom.pair_rotates.any():
        return turns
    real, imag = heads.pairs[freedom.pair_rotates].to(rows.device).unbind(1)
    z = torch.complex(rows[:, real], rows[:, imag])  # [G, P, n]

    def phase(centre: Tensor) -> Tensor:
        inner = (centre * z.conj()).sum(-1)
        return torch.where(inner.abs() > 0, inner / inner.abs().clamp_min(1e-300), torch.ones_like(inner))

    turn = phase(z[0])
    for _ in range(_ROUNDS):
        turn = phase((turn[..., None] * z).mean(0))
    turns[:, real, real] = turn.real
    turns[:, imag, imag] = turn.real
    turns[:, imag, real] = turn.imag
    turns[:, real, imag] = -turn.imag
    return turns
