"""The same blocks by PyTorch's own tensor parallelism: plain modules, ``parallelize_module``, DTensor collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rehead.benchmarks.block_model import EPS, Pieces, Shape, Stack
from rehead.benchmarks.block_products import Ranks

INPUTS, OUTPUTS = ("q", "k", "v", "gate", "up"), ("o", "down")


class DTensorBlock(nn.Module):
    """A block of seven ``nn.Linear`` whose rows and columns DTensor splits.

    A parallel block adds both outputs while they are partial sums, so that DTensor, too, reduces them once; and each
    norm's output enters DTensor once, so that its gradient is reduced once.
    """

    o: nn.Module
    down: nn.Module
    gate: nn.Module
    up: nn.Module

    def __init__(self, shape: Shape, form: str, mesh: DeviceMesh, pieces: Pieces, like: Tensor) -> None:
        super().__init__()
        self.form, self.mesh, self.pieces, self.head_dim = form, mesh, pieces, shape.head_dim
        n, f, kv = shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim
        wide = shape.heads * shape.head_dim
        sizes = {
            "q": (n, wide),
            "k": (n, kv),
            "v": (n, kv),
            "gate": (n, f),
            "up": (n, f),
            "o": (wide, n),
            "down": (f, n),
        }
        for name, (columns, rows) in sizes.items():
            linear = nn.Linear(columns, rows, bias=False, device=like.device, dtype=like.dtype)
            nn.init.normal_(linear.weight, std=columns**-0.5)
            self.add_module(name, linear)
        self.norms = nn.ParameterList(nn.Parameter(like.new_ones(n)) for _ in range(1 if form == "parallel" else 2))
        plan: dict[str, Any] = {name: ColwiseParallel(input_layouts=Replicate()) for name in INPUTS}
        plan |= {name: RowwiseParallel(output_layouts=Partial(), use_local_output=False) for name in OUTPUTS}
        parallelize_module(self, mesh, plan)

    def _enter(self, n: Tensor) -> Any:
        return DTensor.from_local(n, self.mesh, [Replicate()])

    def _leave(self, total: Any) -> Tensor:
        return total.redistribute(self.mesh, [Replicate()]).to_local()

    def _mixed(self, n: Any, mix: Callable[..., Tensor]) -> Any:
        q, k, v = (getattr(self, name)(n).unflatten(-1, (-1, self.head_dim)) for name in ("q", "k", "v"))
        return self.o(mix(q, k, v).flatten(-2))

    def _ffn(self, n: Any) -> Any:
        return self.down(self.pieces.swiglu(self.gate(n), self.up(n)))

    def forward(self, x: Tensor, delta: Tensor | None, mix: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """As :meth:`rehead.benchmarks.block_model.Block.forward`."""
        x = x if delta is None else x + delta
        n = self._enter(F.rms_norm(x, (x.shape[-1],), self.norms[0], EPS))
        if self.form == "parallel":
            return x, self._leave(self._mixed(n, mix) + self._ffn(n))
        x = x + self._leave(self._mixed(n, mix))
        n = self._enter(F.rms_norm(x, (x.shape[-1],), self.norms[1], EPS))
        return x, self._leave(self._ffn(n))


def dtensor_stack(shape: Shape, form: str, ranks: Ranks, mesh: DeviceMesh, pieces: Pieces, like: Tensor) -> Stack:
    """A stack whose blocks are split by DTensor. KV heads must divide over the ranks."""
    stack = Stack(Shape(**{**shape.__dict__, "layers": 0}), form, "separate", ranks, pieces, like)
    stack.shape = shape
    stack.blocks = nn.ModuleList(DTensorBlock(shape, form, mesh, pieces, like) for _ in range(shape.layers))
    return stack
