"""Proof on numbers that a layout is understood: changes of basis that must not change the function do not.

A family that was guessed from names and shapes is only taken when one of its layers, with its heads in another order
and in other bases, gives the same output. Whatever the guess got wrong (a name, the packing, the rotary pairing, a
norm) shows up here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.healing.layerwise import LayerwiseModel
from rehead.models.families.layouts import merge
from rehead.models.freedom import key_freedom
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.variants.pool.grouping import permute
from rehead.variants.pool.methods.procrustes import turned

_TOLERANCE = 1e-3


def prove_layout(model: Model, tokens: int = 48) -> float:
    """Check the first and the last attention layer; returns the larger relative difference.

    Raises:
        UnsupportedError: the function changed, so the layout is not what it was taken for.
    """
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(model.config.vocab_size), (2, tokens), generator=generator)
    worst = 0.0
    with torch.no_grad():
        runner = LayerwiseModel(model, model.config, device)
        hidden = runner.embed([ids], ids.numel())[0]
        for layer in dict.fromkeys((model.layers[0], model.layers[-1])):
            runner.load_layer(layer)
            before = runner.run_layer(layer, hidden)
            moved = disguised(model.heads(layer).to(torch.float32), generator)
            runner.load_layer(layer, merge(model.family, layer, moved, model.source.tensors))
            gap = (runner.run_layer(layer, hidden) - before).norm() / (before - hidden).norm().clamp_min(1e-12)
            runner.unload_layer(layer)
            worst = max(worst, float(gap.nan_to_num(nan=math.inf)))  # Python's max passes over what is not a number
    if not worst < _TOLERANCE:
        raise UnsupportedError(
            f"{model.source.id}: {model.config.model_type} is not in the table, and its layers are not laid out as "
            f"their names suggest (output changed by {worst:.1e}); add the architecture (see CONTRIBUTING.md)"
        )
    return worst


def disguised(heads: Heads, generator: torch.Generator) -> Heads:
    """The same function with KV heads in reverse order and every basis turned as far as its freedom allows."""
    heads = permute(heads, [[head] for head in reversed(range(heads.num_kv_heads))])
    count, size, freedom = heads.num_kv_heads, heads.head_dim, key_freedom(heads)
    keys = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    rest = heads.free_dims()
    if len(rest) and freedom.rest != "none":
        keys[:, rest[:, None], rest[None, :]] = _rotations(count, len(rest), generator)
    if heads.pairs is not None and freedom.pair_rotates.any():
        real, imag = heads.pairs[freedom.pair_rotates].unbind(1)
        angle = torch.rand(count, len(real), generator=generator, dtype=torch.float64) * 6.28
        keys[:, real, real] = keys[:, imag, imag] = angle.cos()
        keys[:, imag, real], keys[:, real, imag] = angle.sin(), -angle.sin()
    values = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    if not heads.fixed_values:
        values = _rotations(count, size, generator)
    return _stretched(turned(heads, keys, values), generator)


def _stretched(heads: Heads, generator: torch.Generator) -> Heads:
    """Scale what may be scaled, channel by channel or pair by pair, and undo it in queries and output: rotations alone
    would pass a norm that the class applies without a module or a weight of its own."""
    freedom = key_freedom(heads)
    key, value = (_scales(heads.num_kv_heads, heads.head_dim, generator) for _ in range(2))
    free = torch.zeros(heads.head_dim, dtype=torch.bool)
    if freedom.rest == "any":
        free[heads.free_dims()] = True
    if heads.pairs is not None and freedom.pair_scales.any():
        real, imag = heads.pairs[freedom.pair_scales].unbind(1)
        key[:, imag] = key[:, real]
        free[real] = free[imag] = True
    key = torch.where(free, key, 1.0)
    value = torch.ones_like(value) if heads.fixed_values else value

    return turned(heads, key.diag_embed(), value.diag_embed(), (1 / key).diag_embed(), (1 / value).diag_embed())


def _scales(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.exp(0.3 * torch.randn(count, size, generator=generator, dtype=torch.float64))


def _rotations(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))[0]
