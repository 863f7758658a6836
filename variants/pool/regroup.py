"""The step: one layer's heads in, the same layer with fewer KV heads out. Pure; knows no files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rehead.healing.moments import Moments
from rehead.lazy import late
from rehead.models.heads import Heads, augmented
from rehead.variants.pool.grouping import contiguous_groups, permute, similar_groups
from rehead.variants.pool.methods.registry import METHODS, MethodContext
from rehead.variants.pool.methods.svd import SLOW_TURN

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

POOL_MOMENTS = ("inputs", "key_inputs", "mixed_inputs")
"""What a calibrated method and the choice of similar heads read."""


@dataclass(frozen=True)
class LayerResult:
    """One regrouped layer.

    Attributes:
        heads: the new weights, float32.
        groups: the old KV heads behind each new one.
        key_error: relative error of all q^T k as bilinear forms of the inputs (0 exact, 1 nothing left); for methods
            that leave the queries alone and know no data, of the key weights themselves.
        value_error: relative error of all W_o W_v likewise.
    """

    heads: Heads
    groups: list[list[int]]
    key_error: float
    value_error: float

    def as_json(self) -> dict[str, object]:
        return {"groups": self.groups, "key_error": round(self.key_error, 6), "value_error": round(self.value_error, 6)}


def regroup(
    heads: Heads, kv: int, method: str, grouping: str = "contiguous", context: MethodContext | None = None
) -> LayerResult:
    """Pool a layer's KV heads into ``kv``.

    Args:
        heads: any dtype; computed in float32 (inside the methods, float64 where it matters).
        kv: a divisor of ``heads.num_kv_heads``; the same number returns the heads untouched.
        method: a registered method.
        grouping: ``"contiguous"`` or ``"similar"``.
        context: seed, layer and moments, of the heads as they are: for as many groups as ``heads`` has KV heads, or
            for any multiple of ``kv`` where groups are contiguous.
    """
    context = context or MethodContext()
    groups = contiguous_groups(heads.num_kv_heads, kv)
    if kv == heads.num_kv_heads:
        return LayerResult(heads, groups, 0.0, 0.0)
    moments = context.moments
    if not METHODS.get(method).any_dtype or grouping == "similar" or moments is not None:
        heads = heads.to(torch.float32)
    if grouping == "similar":
        groups = similar_groups(heads, kv, method, moments)
        heads = permute(heads, groups)
    if moments is not None:
        moments = moments.merged(groups if grouping == "similar" else contiguous_groups(moments.groups, kv))
    pooled = METHODS.get(method).pool(heads, kv, replace(context, moments=moments))
    if pooled.q is heads.q and moments is None:
        errors = weight_error(heads.k, pooled.k), weight_error(heads.v, pooled.v)
    else:
        errors = reconstruction_error(heads, pooled, moments)
    return LayerResult(pooled, groups, *errors)


def weight_error(old: Tensor, new: Tensor) -> float:
    """Distance of heads [K, ...] from the pooled heads [kv, ...] that replace them, relative to the heads' size.

    The measure for methods that leave the queries alone; a pass over two small tensors.
    """
    lost = size = 0.0
    for one, group in zip(new, old.unflatten(0, (len(new), -1))):
        for head in group:  # a head at a time: nothing of the layer's size is made
            lost += float((head - one).square_().sum(dtype=torch.float64))
            size += float(head.float().square().sum(dtype=torch.float64))
    return _ratio(lost, size)


def reconstruction_error(old: Heads, new: Heads, moments: Moments | None = None) -> tuple[float, float]:
    """How far a layer's bilinear forms have moved, whatever basis the heads are in.

    Keys: sum over query heads of |q^T k - q'^T k'|^2, for each rotary pair by itself since they average out against
    each other, but for those too slow to; values: sum of |W_o W_v - W_o' W_v'|^2. In the metric of the inputs where
    moments are given.
    Norms between projection and dot product are left out.

    Returns:
        (key error, value error), each relative to the old forms' size.
    """
    root = None if moments is None else moments.input_roots[0]
    q, k, v = (_per_query(old, name, root) for name in "qkv")
    q2, k2, v2 = (_per_query(new, name, root) for name in "qkv")
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    rest = old.free_dims().to(q.device)
    if old.pairs is not None and len(old.pairs):
        pairs = old.pairs
        slow = torch.zeros(len(pairs), dtype=torch.bool) if moments is None else moments.slow_pairs(SLOW_TURN)
        if len(slow) == len(pairs) and slow.sum() > 1:
            rest, pairs = torch.cat([rest, pairs[slow].flatten().to(q.device)]), pairs[~slow]
        real, imag = pairs.to(q.device).unbind(1)
        turn = lambda t: torch.complex(t[:, real], t[:, imag]).flatten(0, 1)[:, None]  # noqa: E731
        parts.append((turn(q).conj(), turn(k), turn(q2).conj(), turn(k2)))
    if len(rest):
        parts.append((q[:, rest], k[:, rest], q2[:, rest], k2[:, rest]))
    lost = sum(_gap(*part) for part in parts)
    size = sum(_gap(a, b, a[:, :0], b[:, :0]) for a, b, _, _ in parts)
    o, o2 = old.o.double().permute(1, 2, 0), new.o.double().permute(1, 2, 0)
    lost_v, size_v = _gap(o, v, o2, v2), _gap(o, v, o2[:, :0], v2[:, :0])
    return _ratio(lost, size), _ratio(lost_v, size_v)


def _per_query(heads: Heads, name: str, root: Tensor | None) -> Tensor:
    """Projection rows for each query head, [H, D, w], in the metric's square root."""
    weight = augmented(heads, name)
    weight = weight if root is None else weight @ root
    return weight if name == "q" else weight.repeat_interleave(heads.group_size, 0)


def _gap(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> float:
    """sum |a^T b - a2^T b2|^2 over the batch, from Gram matrices: nothing of size w x w is made."""
    left, right = torch.cat([a, -a2], 1), torch.cat([b, b2], 1)
    return float(((left @ left.mH) * (right @ right.mH)).sum().real)


def _ratio(lost: float, size: float) -> float:
    return max(lost / size, 0.0) ** 0.5 if size > 0 else 0.0
