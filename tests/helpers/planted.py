"""Models whose right answer is known: KV heads of a group that are equal, or equal up to what a method may undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from known_heads import changed
from torch import Tensor, nn

from rehead.models.families.layouts import merge, shared_norm_names, split, tensor_names
from rehead.models.families.spec import Family
from rehead.models.freedom import key_freedom
from rehead.models.heads import Heads


def layers_of(family: Family, model: nn.Module) -> Iterator[tuple[int, Heads]]:
    """Every attention layer of a live model as heads."""
    state = model.state_dict()
    for layer in family.attention_layers(model.config):
        yield layer, split(family, model.config, layer, state)


def change(family: Family, model: nn.Module, step: Callable[[int, Heads], Heads]) -> nn.Module:
    """Apply ``step(layer, heads)`` to every attention layer of a live model, in place; head counts must stay."""
    state = model.state_dict()
    for layer, heads in layers_of(family, model):
        state |= merge(family, layer, step(layer, heads.to(torch.float64)).to(torch.float32), state)
    model.load_state_dict(state)
    return model


def tie_norm_pairs(family: Family, model: nn.Module) -> nn.Module:
    """Make the norm weights of every other rotary pair, and of all dimensions without rotation, equal within a model.

    Under a key norm only such pairs may rotate; random weights would leave nothing to plant.
    """
    state = model.state_dict()
    for layer, heads in layers_of(family, model):
        names = tensor_names(family, model.config, layer, state)
        names += shared_norm_names(family, model.config, layer, state)
        for name in names:
            if "norm" not in name or "sub_norm" in name or heads.key_norm not in ("rms", "rms_span"):
                continue
            rows = state[name].reshape(-1, heads.head_dim).clone()
            assert heads.pairs is not None
            for real, imag in heads.pairs[::2]:
                rows[:, imag] = rows[:, real]
            rest = heads.free_dims()
            if len(rest):
                rows[:, rest] = rows[0, rest[0]].clone()
            state[name] = rows.reshape(state[name].shape)
    model.load_state_dict(state)
    return model


def equal_heads(kv: int) -> Callable[[int, Heads], Heads]:
    """A step that makes the KV heads of each of ``kv`` contiguous groups copies of their first."""

    def step(layer: int, heads: Heads) -> Heads:
        def copied(tensor: Tensor) -> Tensor:
            grouped = tensor.unflatten(0, (kv, -1))
            return grouped[:, :1].expand_as(grouped).flatten(0, 1).clone()

        names = ["k", "v", "k_bias", "v_bias"]
        if heads.k_norm is not None and heads.k_norm.ndim == 2:
            names.append("k_norm")
        return replace(heads, **{n: copied(t) for n in names if (t := getattr(heads, n)) is not None})

    return step


def shuffled_heads(kv: int) -> Callable[[int, Heads], Heads]:
    """A step that deals the KV heads of ``kv`` contiguous groups out in turn, query heads with them: same function."""

    def step(layer: int, heads: Heads) -> Heads:
        order = torch.arange(heads.num_kv_heads).reshape(kv, -1).T.flatten()
        queries = (order[:, None] * heads.group_size + torch.arange(heads.group_size)).flatten()
        names = ["k", "v", "k_bias", "v_bias"]
        if heads.k_norm is not None and heads.k_norm.ndim == 2:
            names.append("k_norm")
        moved = {n: t[order] for n in names if (t := getattr(heads, n)) is not None}
        return replace(heads.permute_queries(queries), **moved)

    return step


def rotated_heads(kv: int, method: str, seed: int = 0) -> Callable[[int, Heads], Heads]:
    """A step after :func:`equal_heads`: puts every head but the first of its group in a basis of its own.

    Queries and output projection undo it, so the function stays; what is drawn is what ``method`` may undo: rotations
    for procrustes, for svd scales of rotary pairs and any invertible map of values and of what does not rotate.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def invertible(size: int) -> Tensor:
        left, _, right = torch.linalg.svd(random(size, size))
        scales = torch.exp(0.3 * random(size)) if method == "svd" else torch.ones(size, dtype=torch.float64)
        return left @ torch.diag(scales) @ right

    def step(layer: int, heads: Heads) -> Heads:
        freedom, size = key_freedom(heads), heads.head_dim
        per_group = heads.num_kv_heads // kv
        keys = torch.eye(size, dtype=torch.float64).repeat(heads.num_kv_heads, 1, 1)
        values = keys.clone()
        rest = heads.free_dims()
        assert heads.pairs is not None
        for head in range(heads.num_kv_heads):
            if head % per_group == 0:
                continue
            for index, (real, imag) in enumerate(heads.pairs.tolist()):
                if not freedom.pair_rotates[index]:
                    continue
                angle = random(1) * 2
                scale = torch.exp(0.4 * random(1)) if method == "svd" and freedom.pair_scales[index] else torch.ones(1)
                c, s = float(angle.cos() * scale), float(angle.sin() * scale)
                keys[head, [real, real, imag, imag], [real, imag, real, imag]] = torch.tensor([c, -s, s, c]).double()
            if len(rest) and freedom.rest != "none":
                free = invertible(len(rest))
                if freedom.rest == "orthogonal":
                    left, _, right = torch.linalg.svd(free)
                    free = left @ right
                keys[head, rest[:, None], rest[None, :]] = free
            if not heads.fixed_values:
                values[head] = invertible(size)
        return changed(heads, keys, values)

    return step


def can_turn(family: Family, model: nn.Module) -> bool:
    """Whether there is anything for :func:`rotated_heads` to plant."""
    for _, heads in layers_of(family, model):
        freedom = key_freedom(heads)
        if not heads.fixed_values or bool(freedom.pair_rotates.any()):
            return True
        if len(heads.free_dims()) and freedom.rest != "none":
            return True
    return False
