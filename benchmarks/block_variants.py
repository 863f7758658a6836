"""The variants of the benchmark of blocks, and the clock that they run against."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rehead.benchmarks.block_model import BRANCHES, EPS, FORMS, FUSED, ONE, SEPARATE, Pieces, Shape, Stack
from rehead.benchmarks.block_products import Ranks
from rehead.benchmarks.graphs import warm_up

PARTS = 4
"""Into how many parts an overlapped output product is cut."""

SETTLE = 0.06
"""Seconds that a step runs untimed before it is timed."""


@dataclass(frozen=True)
class Variant:
    """One way to run one form.

    Attributes:
        form: ``"serial"`` or ``"parallel"``.
        products: see :data:`rehead.benchmarks.block_model.PRODUCTS`.
        compiled: ``"no"``, ``"pieces"`` (element-wise parts) or ``"block"`` (whole blocks; one rank only).
        collectives: ``"none"``, ``"plain"``, ``"overlapped"``, ``"one-shot"`` (decode) or ``"dtensor"``.
    """

    form: str
    products: str
    compiled: str
    collectives: str

    @property
    def label(self) -> str:
        return f"{self.form}, {self.products}, compiled: {self.compiled}, collectives: {self.collectives}"


def variants(step: str, size: int, kv_heads: int, compiled: Sequence[str], full: bool) -> list[Variant]:
    """What is tried; the short list leaves out what the full one has shown to be slower everywhere."""
    made = []
    ways = ["none"] if size == 1 else ["plain", "overlapped"] if step == "train" else ["plain", "one-shot"]
    for form in FORMS:
        products = [FUSED, *([ONE] if form == "parallel" and (full or step == "decode") else [])]
        # The backward pass of two branches would reduce two gradients.
        products += [BRANCHES] if form == "parallel" and (size == 1 or step == "decode") else []
        products += [SEPARATE] if full else []
        for product in products:
            for mode in compiled:
                if mode == "block" and (size > 1 or step == "decode" or product in (SEPARATE, BRANCHES)):
                    continue
                made += [Variant(form, product, mode, way) for way in ways]
        if full and size > 1 and step == "train" and kv_heads % size == 0:
            made.append(Variant(form, SEPARATE, "pieces" if "pieces" in compiled else "no", "dtensor"))
    return made


class Bench:
    """The ranks, their device, and what is shared between measurements."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.index = dist.get_rank() if dist.is_initialized() else 0
        self.device, self.dtype, self.seconds = device, dtype, seconds
        self._mesh: Any = None
        self._pieces: Pieces | None = None
        self._symmetric: Tensor | None = None
        # Every variant compiles the same functions anew; the default limit would send the later ones back to eager.
        torch._dynamo.config.recompile_limit = 256

    def pieces(self, compiled: str) -> Pieces:
        if compiled != "pieces":
            return Pieces()
        self._pieces = self._pieces or Pieces.compiled()
        return self._pieces

    def symmetric(self, numbers: int) -> Tensor:
        """Memory that every rank can read, for one-shot all-reduces."""
        if self._symmetric is None or self._symmetric.numel() < numbers:
            import torch.distributed._symmetric_memory as memory

            group: Any = dist.group.WORLD
            self._symmetric = memory.empty(numbers, dtype=self.dtype, device=self.device)
            memory.rendezvous(self._symmetric, group.group_name)
        return self._symmetric

    def ranks(self, variant: Variant, shape: Shape) -> Ranks:
        if self.size == 1:
            return Ranks()
        made = Ranks(self.size, self.index, dist.group.WORLD, PARTS if variant.collectives == "overlapped" else 1)
        if variant.collectives == "one-shot":
            made.symmetric = self.symmetric(shape.batch * shape.hidden)
        return made

    def stack(self, variant: Variant, shape: Shape) -> Stack:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        ranks, pieces = self.ranks(variant, shape), self.pieces(variant.compiled)
        if variant.collectives == "dtensor":
            from torch.distributed.device_mesh import init_device_mesh

            self._mesh = self._mesh or init_device_mesh(self.device.type, (self.size,))
            return dtensor_stack(shape, variant.form, ranks, self._mesh, pieces, like)
        stack = Stack(shape, variant.form, variant.products, ranks, pieces, like)
        if variant.compiled == "block":
            for block in stack.blocks:
                block.compile(dynamic=False)
        return stack

    def inputs(self, shape: Shape, length: int) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(7)
        size = (shape.batch, length, shape.hidden)
        return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

    def step(self, variant: Variant, shape: Shape, kind: str) -> Callable[[], Any]:
        """A function that runs one step."""
        stack = self.stack(variant, shape)
        if kind == "decode":
            x, cache = self.inputs(shape, 1), stack.empty_cache(torch.empty(0, dtype=self.dtype, device=self.device))
            return lambda: stack.decode(x, cache)
        x = self.inputs(shape, shape.length).requires_grad_()
        grad = self.inputs(shape, shape.length)
        parameters = [x, *stack.parameters()]

        def train() -> None:
            for parameter in parameters:
                parameter.grad = None
            stack(x).backward(grad)

        return train

    def captured(self, step: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
        """The step as a CUDA graph, if there is a GPU and the step can be captured."""
        if self.device.type != "cuda":
            step()
            return step, False
        warm_up(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (the collectives' watchdog) may call into CUDA meanwhile.
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        except RuntimeError:
            torch.cuda.synchronize()
            step()
            return step, False

        def replay(kept: Callable[[], Any] = step) -> None:
            # The graph reads the step's tensors where they are; it does not keep them.
            graph.replay()

        return replay, True

    def times(self, steps: Sequence[Callable[[], Any]]) -> list[list[float]]:
        """Milliseconds of every step, taken in turns, so that a drift of clocks meets all of them.

        Under a limit of power the clock follows what ran last: turns are shuffled, and a step runs by itself for a
        while before it is timed.
        """
        taken: list[list[float]] = [[] for _ in steps]
        rounds, before = self._rounds(steps)
        turns, generator = list(range(len(steps))), random.Random(0)  # the same on every rank
        for _ in range(rounds):
            generator.shuffle(turns)
            for turn in turns:
                for _ in range(before[turn]):
                    steps[turn]()
                taken[turn].append(self._time(steps[turn]))
        return taken

    def _rounds(self, steps: Sequence[Callable[[], Any]]) -> tuple[int, list[int]]:
        """How many rounds fit into the time, and how often each step runs untimed before it is timed."""
        for step in steps:
            self._time(step)
        took = [self._time(step) / 1000 for step in steps]
        settle = min(SETTLE, self.seconds / 10)
        before = [max(1, round(settle / max(one, 1e-6))) for one in took]
        whole = sum(one * (count + 1) for one, count in zip(took, before))
        rounds = max(5, min(50, int(self.seconds * len(steps) / max(whole, 1e-6))))
        agreed = torch.tensor([rounds, *before], device=self.device)
        if self.size > 1:  # every rank must take part equally often
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        rounds, *before = agreed.tolist()
        return rounds, before

    def _time(self, step: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1000
        # Ranks start together, so that waiting for a late one is not counted as work.
        if self.size > 1:
            dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


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
