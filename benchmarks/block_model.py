"""Stacks of serial and of parallel blocks for the benchmark: LLaMA's parts, written to be as fast as each form allows.

Weights are drawn by seed as whole matrices and then split, so that every variant, on any number of ranks, computes the
same function of its form and can be checked against the plain one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rehead.benchmarks.block_products import Ranks, Rows, input_products, output_products, sum_over_ranks

FORMS = ("serial", "parallel")
HEAD_DIM = 128
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """A stack of blocks and what runs through it.

    Attributes:
        hidden: hidden size; heads have 128 dimensions.
        kv_heads: key and value heads.
        layers: blocks.
        batch, length: of a training step; a decode step has one token for each of ``batch``, after ``length``.
    """

    hidden: int
    kv_heads: int
    layers: int = 4
    batch: int = 4
    length: int = 2048
    head_dim: int = HEAD_DIM

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def intermediate(self) -> int:
        """Gated FFN of 8/3 of the hidden size, as LLaMA rounds it: 1024 -> 2816, 4096 -> 11008."""
        return -(-8 * self.hidden // 3 // 256) * 256 if self.hidden >= 256 else 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Of all blocks, norms left out."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def training_flops(self) -> float:
        """Floating-point operations of a forward and backward pass; causal attention counted as half."""
        tokens = self.batch * self.length
        attention = 2 * tokens * self.length * self.heads * self.head_dim * self.layers
        return 3.0 * (2.0 * tokens * self.parameters + attention)


# Element-wise pieces. Compiled once for all sizes where the variant says so.


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm): one pass over memory when compiled, in the backward pass too."""
    stream = x if delta is None else x + delta
    return stream, F.rms_norm(stream, (stream.shape[-1],), weight, EPS)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_joint(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split pairing: ``x [B, S, heads, D]``, ``cos`` and ``sin [S, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(query, cos, sin), rotate(key, cos, sin)


@dataclass
class Pieces:
    """The element-wise pieces, as they are or compiled."""

    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    swiglu: Callable[..., Tensor] = swiglu
    swiglu_joint: Callable[..., Tensor] = swiglu_joint
    rotate: Callable[..., tuple[Tensor, Tensor]] = rotate_both

    @staticmethod
    def compiled() -> Pieces:
        """Compiled anew for every size: with sizes left open the same pieces take three times as long."""
        return Pieces(
            *(torch.compile(f, dynamic=False) for f in (add_norm, swiglu, swiglu_joint, rotate_both))  # type: ignore[arg-type]
        )


SEPARATE, FUSED, ONE, BRANCHES = "separate", "fused", "one", "branches"
PRODUCTS = {
    SEPARATE: "q, k, v, gate, up, o and down each by itself, norms with weights",
    FUSED: "qkv and gate-up joint, norms folded; a parallel block's outputs accumulate in one buffer",
    ONE: "parallel only: one product in, one product out",
    BRANCHES: "parallel only: as fused, the FFN on a stream of its own beside attention",
}


class Block(nn.Module):
    """One rank's share of one block, serial or parallel.

    Args:
        shape: sizes.
        form: ``"serial"`` or ``"parallel"``.
        products: one of :data:`PRODUCTS`.
        ranks: who takes part.
        pieces: element-wise pieces.
        seed: of the whole block's weights.
    """

    def __init__(
        self, shape: Shape, form: str, products: str, ranks: Ranks, pieces: Pieces, seed: int, like: Tensor
    ) -> None:
        super().__init__()
        self.form, self.products, self.ranks, self.pieces = form, products, ranks, pieces
        self.head_dim = shape.head_dim
        self.heads = shape.heads // ranks.size
        # Fewer KV heads than ranks: every rank holds the one that its query heads read.
        self.kv_heads = max(1, shape.kv_heads // ranks.size)
        weights = self._draw(shape, seed, like)
        q, k, v, gate, up, o, down = (weights[name] for name in ("q", "k", "v", "gate", "up", "o", "down"))
        norms = 1 if form == "parallel" else 2
        if products == SEPARATE:
            self.norms = nn.ParameterList(torch.ones_like(q[0]) for _ in range(norms))
            matrices = {"q": q, "k": k, "v": v, "gate": gate, "up": up, "o": o, "down": down}
        elif products in (FUSED, BRANCHES):
            self.norms = nn.ParameterList()
            matrices = {"qkv": torch.cat((q, k, v)), "gate_up": torch.cat((gate, up)), "o": o, "down": down}
        else:
            self.norms = nn.ParameterList()
            matrices = {"in": torch.cat((q, k, v, gate, up)), "out": torch.cat((o, down), 1)}
        self.matrices = nn.ParameterDict(matrices)
        self.cut = [q.shape[0], k.shape[0], v.shape[0]]
        # Fewer KV heads than ranks: their gradients are sums over ranks.
        self.replicated: Rows = ()
        if shape.kv_heads < ranks.size:
            separate = ((1, 0, k.shape[0]), (2, 0, v.shape[0]))
            self.replicated = separate if products == SEPARATE else ((0, q.shape[0], sum(self.cut)),)

    def _draw(self, shape: Shape, seed: int, like: Tensor) -> dict[str, Tensor]:
        """This rank's part of every matrix, in the dtype and on the device of ``like``."""
        generator = torch.Generator(device=like.device).manual_seed(seed)
        n, f, d = shape.hidden, shape.intermediate, shape.head_dim
        size, index = self.ranks.size, self.ranks.index

        def make(rows: int, columns: int, dim: int, parts: int) -> Tensor:
            whole = torch.randn(rows, columns, generator=generator, device=like.device, dtype=torch.float32)
            part = whole.mul_(columns**-0.5).chunk(parts, dim)[index * parts // size]
            return part.to(like.dtype).contiguous()

        groups = min(size, shape.kv_heads)
        return {
            "q": make(shape.heads * d, n, 0, size),
            "k": make(shape.kv_heads * d, n, 0, groups),
            "v": make(shape.kv_heads * d, n, 0, groups),
            "gate": make(f, n, 0, size),
            "up": make(f, n, 0, size),
            "o": make(n, shape.heads * d, 1, size),
            "down": make(n, f, 1, size),
        }

    def _norm(self, x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        return self.pieces.add_norm(x, delta, self.norms[index] if len(self.norms) else None)

    def _attention_inputs(self, n: Tensor) -> tuple[Tensor, ...]:
        m = self.matrices
        if self.products == SEPARATE:
            return input_products(n, (m["q"], m["k"], m["v"]), self.ranks, self.replicated)
        (qkv,) = input_products(n, (m["qkv"],), self.ranks, self.replicated)
        return qkv.split(self.cut, dim=-1)

    def _activate(self, n: Tensor) -> Tensor:
        m = self.matrices
        if self.products == SEPARATE:
            return self.pieces.swiglu(*input_products(n, (m["gate"], m["up"]), self.ranks))
        return self.pieces.swiglu_joint(*input_products(n, (m["gate_up"],), self.ranks))

    def forward(self, x: Tensor, delta: Tensor | None, mix: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: the residual stream ``[B, S, n]``, without ``delta``.
            delta: what the block before adds to it; its norm adds it on the way.
            mix: ``(q, k, v)``, each ``[B, S, heads, D]`` -> attention's output, of q's shape.

        Returns:
            (stream, what this block's end adds to it).
        """
        m = self.matrices
        if self.form == "serial":
            x, n = self._norm(x, delta, 0)
            heads = self._mix(self._attention_inputs(n), mix)
            x, n = self._norm(x, output_products((heads,), (m["o"],), self.ranks), 1)
            return x, output_products((self._activate(n),), (m["down"],), self.ranks)
        x, n = self._norm(x, delta, 0)
        if self.products == BRANCHES:
            return x, self._branches(n, mix)
        if self.products == ONE:
            (joint,) = input_products(n, (m["in"],), self.ranks, self.replicated)
            *qkv, gate_up = joint.split([*self.cut, joint.shape[-1] - sum(self.cut)], dim=-1)
            both = torch.cat((self._mix(qkv, mix), self.pieces.swiglu_joint(gate_up)), dim=-1)
            return x, output_products((both,), (m["out"],), self.ranks)
        if self.products == SEPARATE:
            q, k, v, gate, up = input_products(
                n, [m[name] for name in ("q", "k", "v", "gate", "up")], self.ranks, self.replicated
            )
            qkv, activated = (q, k, v), self.pieces.swiglu(gate, up)
        else:
            joint_qkv, gate_up = input_products(n, (m["qkv"], m["gate_up"]), self.ranks, self.replicated)
            qkv, activated = joint_qkv.split(self.cut, dim=-1), self.pieces.swiglu_joint(gate_up)
        return x, output_products((self._mix(qkv, mix), activated), (m["o"], m["down"]), self.ranks)

    def _branches(self, n: Tensor, mix: Callable[..., Tensor]) -> Tensor:
        """Both halves of a parallel block at the same time: one fills what the other leaves idle.

        Autograd runs each operation's backward pass on the stream of its forward pass, so that overlaps too.
        """
        m = self.matrices

        def attention() -> Tensor:
            return output_products((self._mix(self._attention_inputs(n), mix),), (m["o"],), Ranks())

        def ffn() -> Tensor:
            return output_products((self._activate(n),), (m["down"],), Ranks())

        if not n.is_cuda:
            return sum_over_ranks(attention(), ffn(), self.ranks)
        here, beside = torch.cuda.current_stream(), _beside(n.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            theirs = ffn()
        mine = attention()
        here.wait_stream(beside)
        # The allocator must not give memory away that the other stream still uses.
        n.record_stream(beside)
        theirs.record_stream(here)
        return sum_over_ranks(mine, theirs, self.ranks)

    def _mix(self, qkv: Any, mix: Callable[..., Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        return mix(q, k, v).flatten(-2)


class Stack(nn.Module):
    """Blocks one after another, with rotary causal attention; ``[B, S, n]`` in and out."""

    def __init__(
        self, shape: Shape, form: str, products: str, ranks: Ranks, pieces: Pieces, like: Tensor, seed: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.pieces = shape, pieces
        self.blocks = nn.ModuleList(
            Block(shape, form, products, ranks, pieces, seed + layer, like) for layer in range(shape.layers)
        )
        positions = torch.arange(shape.length + 1, dtype=torch.float32, device=like.device)
        powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=like.device) / shape.head_dim
        angles = torch.outer(positions, 10000.0**-powers).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]

        def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = self.pieces.rotate(query, key, cos, sin)
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True,
                enable_gqa=query.shape[2] != key.shape[2],
            )  # fmt: skip
            return out.transpose(1, 2)

        delta = None
        for block in self.blocks:
            x, delta = block(x, delta, mix)
        assert delta is not None
        return x + delta

    def empty_cache(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Random keys and values of ``length`` positions for each block, and room for one more."""
        block: Any = self.blocks[0]
        size = (self.shape.batch, self.shape.length + 1, block.kv_heads, self.shape.head_dim)
        generator = torch.Generator(device=like.device).manual_seed(9)
        made = []
        for _ in self.blocks:
            pair = [torch.randn(size, generator=generator, device=like.device).to(like.dtype) for _ in range(2)]
            made.append((pair[0], pair[1]))
        return made

    @torch.no_grad()
    def decode(self, x: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One new token ``[B, 1, n]`` after the cache's ``length``; writes its keys and values behind them."""
        length = self.shape.length
        cos, sin = self.cos[length:], self.sin[length:]
        delta = None
        for block, (keys, values) in zip(self.blocks, cache):

            def mix(query: Tensor, key: Tensor, value: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                query, key = self.pieces.rotate(query, key, cos, sin)
                keys[:, length:].copy_(key)
                values[:, length:].copy_(value)
                return _attend_one(query, keys, values)

            x, delta = block(x, delta, mix)
        assert delta is not None
        return x + delta


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of the FFN's branch."""
    return torch.cuda.Stream(device)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the last position over the whole cache: the decode kernel on a GPU, SDPA elsewhere."""
    query, keys, values = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if query.is_cuda:
        from rehead.attention.kernels import decode

        return decode(query, keys, values, scale=query.shape[-1] ** -0.5, q_offset=keys.shape[2] - 1)
    out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])
    return out.transpose(1, 2)
