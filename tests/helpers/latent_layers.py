"""Layers whose latent form is known, and the moments of plain attention over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from known_heads import angles, attend, make_heads

from rehead.healing.gatherer import Gatherer
from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import Heads
from rehead.models.watch import Seen
from rehead.variants.latent.seen import NEEDS


def planted(pairing: str, dims: int, rank: int, bias: bool = False, seed: int = 0) -> Heads:
    """Four KV heads: keys complex multiples of one, per pair; values and what does not turn of ``rank`` together."""
    heads = make_heads(4, pairing, dims, bias, seed)
    g = torch.Generator().manual_seed(seed + 1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    low = lambda t: t @ rows  # noqa: E731
    rows = draw(rank, heads.k.shape[-1]) * 0.4
    k, k_bias = heads.k.clone(), heads.k_bias
    real, imag = heads.pairs.unbind(1)
    lead = torch.complex(k[0, real], k[0, imag])
    factor = torch.complex(draw(4, len(real)), draw(4, len(real)))
    pairs = factor[..., None] * lead
    k[:, real], k[:, imag] = pairs.real, pairs.imag
    free = heads.free_dims()
    k[:, free] = low(draw(4, len(free), rank))
    if bias:
        lead = torch.complex(k_bias[0, real], k_bias[0, imag])
        k_bias = k_bias.clone()
        k_bias[:, real], k_bias[:, imag] = (factor * lead).real, (factor * lead).imag
        k_bias[:, free] = 0
    return replace(heads, k=k, k_bias=k_bias, v=low(draw(4, heads.v.shape[1], rank)))


def latent_moments(heads: Heads, x: torch.Tensor, groups: int = 1) -> Moments:
    """What plain causal attention over inputs x [S, n] shows of a layer."""
    turn = torch.exp(1j * torch.arange(len(x)).double()[:, None] * angles(heads))
    rotation = Rotation(turn.to(torch.complex64), heads.pairs)
    gatherer = Gatherer(NEEDS, groups, heads.o.float(), rotation)
    batch = torch.cat([x, torch.ones(len(x), 1)], -1).float()[None]
    project = lambda name: torch.einsum("hdn,sn->hsd", getattr(heads, name).double(), x)[None].float()  # noqa: E731
    queries = project("q") if heads.q_bias is None else project("q") + heads.q_bias.float()[:, None]
    p, none = attend(heads, x)[1][None].float(), torch.empty(0)
    gatherer.add_inputs(batch)
    seen = Seen(queries, none, project("v"), none, none, p, none, heads.head_dim**-0.5, torch.arange(len(x)))
    gatherer.add_attention(batch, seen)
    return gatherer.finish()
