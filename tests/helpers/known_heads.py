"""Heads whose right answer is known, plain attention over them, and what a layer would see of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from rehead.healing.gatherer import Gatherer
from rehead.healing.moments import Moments
from rehead.models.heads import Heads, rotary_pairs
from rehead.models.watch import Seen
from rehead.variants.pool.regroup import POOL_MOMENTS

QUERIES, SIZE, WIDTH, OUT, LENGTH = 8, 8, 24, 20, 40


def make_heads(kv: int, pairing: str = "half", dims: int = SIZE, bias: bool = False, seed: int = 0) -> Heads:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    heads = Heads(
        draw(QUERIES, SIZE, WIDTH) * 0.4,
        draw(kv, SIZE, WIDTH) * 0.4,
        draw(kv, SIZE, WIDTH),
        draw(OUT, QUERIES, SIZE),
        pairs=rotary_pairs(pairing, dims),
    )
    if bias:
        heads.q_bias, heads.k_bias, heads.v_bias = draw(QUERIES, SIZE), draw(kv, SIZE), draw(kv, SIZE)
    return heads


def attend(heads: Heads, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [S, OUT], probabilities [H, S, S]) of plain causal attention in float64."""

    def project(name: str) -> torch.Tensor:
        states = torch.einsum("hdn,sn->hsd", getattr(heads, name).double(), x)
        bias = getattr(heads, name + "_bias")
        states = states if bias is None else states + bias.double()[:, None]
        return states if name == "q" else states.repeat_interleave(heads.group_size, 0)

    def rotate(states: torch.Tensor) -> torch.Tensor:
        if not len(heads.pairs):
            return states
        real, imag = heads.pairs.unbind(1)
        turn = torch.exp(1j * torch.arange(len(x)).double()[:, None] * angles(heads))
        z = torch.complex(states[..., real], states[..., imag]) * turn
        states = states.clone()
        states[..., real], states[..., imag] = z.real, z.imag
        return states

    def normed(states: torch.Tensor) -> torch.Tensor:
        return states if heads.key_norm == "none" else states * states.square().mean(-1, keepdim=True).rsqrt()

    scores = rotate(normed(project("q"))) @ rotate(normed(project("k"))).mT * SIZE**-0.5
    p = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return torch.einsum("mhd,hsd->sm", heads.o.double(), p @ project("v")), p


def angles(heads: Heads) -> torch.Tensor:
    count = len(heads.pairs)
    return 10000 ** (-torch.arange(count).double() / max(count, 1))


def gathered(heads: Heads, x: torch.Tensor, groups: int) -> Moments:
    """What plain attention over inputs x [S, n] shows, for groups of neighbouring query heads."""
    gatherer = Gatherer(POOL_MOMENTS, groups, heads.o.float(), None)
    batch = torch.cat([x, torch.ones(len(x), 1)], -1).float()[None]
    gatherer.add_inputs(batch)
    gatherer.add_attention(batch, shown(attend(heads, x)[1].float()[None]))
    return replace(gatherer.finish(), angles=angles(heads))


def shown(probabilities: torch.Tensor) -> Seen:
    """Attention of which nothing is known but its probabilities [b, H, R, S], for the first R queries."""
    none = torch.empty(0)
    return Seen(none, none, none, none, none, probabilities, none, 1.0, torch.arange(probabilities.shape[2]))


def in_own_bases(heads: Heads, kv: int, rigid: bool, seed: int = 1) -> Heads:
    """Spread each KV head over several, each in a basis of its own that its freedom allows: the same function."""
    g = torch.Generator().manual_seed(seed)
    count = heads.num_kv_heads * kv
    spread = replace(
        heads,
        **{
            name: getattr(heads, name).repeat_interleave(kv, 0)
            for name in ("k", "v", "k_bias", "v_bias")
            if getattr(heads, name) is not None
        },
    )
    keys, values = [], []
    for _ in range(count):
        key = torch.eye(SIZE, dtype=torch.float64)
        real, imag = heads.pairs.unbind(1)
        radius = torch.ones(len(real)) if rigid else torch.rand(len(real), generator=g) + 0.5
        c = torch.polar(radius.double(), torch.rand(len(real), generator=g).double() * 6)
        key[real, real], key[imag, imag], key[imag, real], key[real, imag] = c.real, c.real, c.imag, -c.imag
        rest = heads.free_dims()
        key[rest[:, None], rest] = basis(len(rest), rigid, g)
        keys.append(key)
        values.append(basis(SIZE, rigid, g))
    return changed(spread, torch.stack(keys), torch.stack(values))


def basis(size: int, rigid: bool, g: torch.Generator) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=g, dtype=torch.float64)
    return torch.linalg.qr(matrix)[0] if rigid and size else matrix


def changed(heads: Heads, keys: torch.Tensor, values: torch.Tensor) -> Heads:
    """k -> A k with q -> A^-T q, v -> B v with o -> o B^-1."""
    group = heads.group_size
    back_k = torch.linalg.inv(keys).mT.repeat_interleave(group, 0)
    back_v = torch.linalg.inv(values).repeat_interleave(group, 0)
    apply = lambda m, t: None if t is None else torch.einsum("hij,hj...->hi...", m, t)  # noqa: E731
    return replace(
        heads,
        q=apply(back_k, heads.q),
        q_bias=apply(back_k, heads.q_bias),
        k=apply(keys, heads.k),
        k_bias=apply(keys, heads.k_bias),
        v=apply(values, heads.v),
        v_bias=apply(values, heads.v_bias),
        o=torch.einsum("mhj,hji->mhi", heads.o, back_v),
    )


LAYOUTS = [("half", SIZE), ("interleaved", SIZE), ("half", 4), ("none", 0)]


def regrouped_equal(base: Heads) -> Heads:
    return replace(base, k=base.k.repeat_interleave(2, 0), v=base.v.repeat_interleave(2, 0))
