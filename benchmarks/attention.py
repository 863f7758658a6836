"""Claim: exact attention on a Hopper GPU, forward and backward, faster than what PyTorch ships.

Prints TFLOP/s of Rehead beside SDPA flash, SDPA cuDNN and FlexAttention for the same tensors in one run, and the error
of each against float64; for windows, their rate as a share of that of the causal shape of the same sizes.
Floating-point operations count visible (query, key) pairs only: 4 D a pair forward, 10 D backward. Times are medians of
CUDA-event timings with the L2 cache flushed between runs.

    python -m rehead.benchmarks.attention [--only NAME] [--peers rehead,flash,cudnn,flex] [--json FILE]
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rehead.benchmarks.command import kernel_parser, print_report, run_script
from rehead.errors import UnsupportedError, check_names

PEERS = ("rehead", "flash", "cudnn", "flex")
BACKENDS = {
    "flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    "cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
    "math": torch.nn.attention.SDPBackend.MATH,
}
"""SDPA's implementations by name."""


@dataclass(frozen=True)
class Shape:
    """One row of the table: bf16, causal, optionally with a sliding window and first tokens that stay visible."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    seq: int
    dim: int
    window: int | None = None
    first: int = 0

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all heads."""
        reach = min(self.window or self.seq, self.seq)
        beyond = sum(min(self.first, row - reach + 1) for row in range(reach, self.seq)) if self.first else 0
        return self.batch * self.heads * (reach * (reach + 1) // 2 + (self.seq - reach) * reach + beyond)


SHAPES = (
    Shape("d128", 4, 32, 32, 4096, 128),
    Shape("d64", 4, 16, 16, 4096, 64),
    Shape("d128-16k", 1, 32, 32, 16384, 128),
    Shape("d128-16k-gqa", 1, 32, 8, 16384, 128),
    Shape("d128-16k-gqa-w4k", 1, 32, 8, 16384, 128, 4096),
    Shape("d128-32k-gqa", 1, 32, 8, 32768, 128),
    Shape("d128-32k-gqa-w1k", 1, 32, 8, 32768, 128, 1024),
    Shape("d128-32k-gqa-w1k-4", 1, 32, 8, 32768, 128, 1024, 4),
    Shape("d64-32k", 1, 16, 16, 32768, 64),
    Shape("d64-32k-w1k-4", 1, 16, 16, 32768, 64, 1024, 4),
)


def require_cuda(what: str) -> None:
    """Raise :class:`UnsupportedError` on a machine whose GPU the benchmark cannot use."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"the {what} benchmark measures GPU kernels and this machine has no CUDA GPU; run it on one"
        )


def median_ms(function: Callable[[], object], budget_ms: float = 300.0) -> float:
    """Median milliseconds of ``function`` on the GPU over about ``budget_ms`` of warm runs, L2 flushed each time."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def timed(runs: int) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(runs)]
        for start, end in zip(starts, ends):
            flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends)]

    function()
    first = statistics.median(timed(3))
    timed(max(3, int(budget_ms / 4 / first)))
    return statistics.median(timed(max(5, int(budget_ms / first))))


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as transformers hands them over ([B, S, heads, D] memory, transposed) and the output's gradient."""

    def make(heads: int) -> Tensor:
        size = (shape.batch, shape.seq, heads, shape.dim)
        return torch.randn(size, dtype=torch.bfloat16, device="cuda").transpose(1, 2).requires_grad_()

    grad = torch.randn(shape.batch, shape.seq, shape.heads, shape.dim, dtype=torch.bfloat16, device="cuda")
    return make(shape.heads), make(shape.kv_heads), make(shape.kv_heads), grad


def _sdpa(backend: torch.nn.attention.SDPBackend, shape: Shape) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if shape.window is not None:
            raise UnsupportedError("SDPA's fused backends take no window")
        with torch.nn.attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
            )
        return out.transpose(1, 2)

    return call


def _flex(shape: Shape) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, first = shape.window or shape.seq, shape.first

    def rule(b, h, q, k):
        return (q >= k) & ((q - k < window) | (k < first))

    block_mask = create_block_mask(rule, None, None, shape.seq, shape.seq, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gqa = shape.heads != shape.kv_heads
        return compiled(query, key, value, block_mask=block_mask, enable_gqa=gqa).transpose(1, 2)

    return call


def peer_call(name: str, shape: Shape) -> Callable[..., Tensor]:
    """What computes a shape's call from query, key and value: one of :data:`PEERS` or :data:`BACKENDS`."""
    from rehead.attention.kernels import attention

    if name in BACKENDS:
        return _sdpa(BACKENDS[name], shape)
    if name == "flex":
        return _flex(shape)
    return functools.partial(
        attention, scale=shape.dim**-0.5, causal=True, window=shape.window, sink_tokens=shape.first
    )


def _errors(name: str, shape: Shape) -> tuple[float, float]:
    """Relative errors against float64 of the output and of the worst gradient, on two heads of at most 2048 tokens."""
    from rehead.attention.kernels import reference

    torch.manual_seed(0)
    window = shape.window and min(shape.window, 512)
    small = Shape(shape.name, 1, 2, 2, min(shape.seq, 2048), shape.dim, window, shape.first)
    query, key, value, grad = _inputs(small)
    wide = [item.detach().double().requires_grad_() for item in (query, key, value)]
    exact = reference.attention(*wide, scale=small.dim**-0.5, causal=True, window=small.window, sink_tokens=small.first)
    want = [exact, *torch.autograd.grad(exact, wide, grad.double())]
    out = peer_call(name, small)(query, key, value)
    got = [out, *torch.autograd.grad(out, (query, key, value), grad)]
    errors = [float(((a.detach().double() - b).norm() / b.norm()).detach()) for a, b in zip(got, want)]
    return errors[0], max(errors[1:])


def measure(shape: Shape, peer: str, budget_ms: float = 300.0, errors: bool = True) -> dict[str, object]:
    """One row: milliseconds and TFLOP/s forward and backward of ``peer`` on ``shape``, or the reason there is none."""
    row: dict[str, object] = {"shape": shape.name, "peer": peer, **asdict(shape)}
    try:
        call = peer_call(peer, shape)
        query, key, value, grad = _inputs(shape)
        with torch.no_grad():
            forward = median_ms(lambda: call(query, key, value), budget_ms)
        out = call(query, key, value)
        backward = median_ms(lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True), budget_ms)
        row |= {
            "forward_ms": forward,
            "backward_ms": backward,
            "forward_tflops": 4 * shape.dim * shape.pairs / forward / 1e9,
            "backward_tflops": 10 * shape.dim * shape.pairs / backward / 1e9,
        }
        if errors:
            row["error_out"], row["error_grad"] = _errors(peer, shape)
    except (UnsupportedError, RuntimeError) as error:
        row["skipped"] = str(error).splitlines()[0][:100]
    return row


def run(
    only: Sequence[str] | None = None, peers: Sequence[str] = PEERS, budget_ms: float = 300.0
) -> list[dict[str, object]]:
    """All rows of the table.

    Args:
        only: names of :data:`SHAPES` to measure; all by default.
        peers: which of :data:`PEERS` to measure.
        budget_ms: GPU time spent on each figure.

    Raises:
        UnsupportedError: no CUDA GPU.
        UsageError: a shape or peer that does not exist.
    """
    require_cuda("attention")
    known = {shape.name: shape for shape in SHAPES}
    check_names("shape", only or (), known)
    check_names("peer", peers, PEERS)
    return [measure(known[name], peer, budget_ms) for name in (only or known) for peer in peers]


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'shape':18} {'kernel':8} {'forward':>16} {'backward':>16}   error out / grad"]
    for row in rows:
        head = f"{row['shape']:18} {row['peer']:8} "
        if "skipped" in row:
            lines.append(head + f"  none: {row['skipped']}")
            continue
        text = head
        for part in ("forward", "backward"):
            text += f"{row[part + '_ms']:7.3f} ms {row[part + '_tflops']:5.0f} "
        if "error_out" in row:
            text += f"  {row['error_out']:.2e} / {row['error_grad']:.2e}"
        lines.append(text)
    return "\n".join(lines)


def proportions(rows: Sequence[dict[str, object]]) -> list[str]:
    """For each window the rate per visible pair, as a share of that of the causal shape without it, one line each."""
    lines = []
    for row in rows:
        sizes = [row.get(name) for name in ("peer", "batch", "heads", "kv_heads", "seq", "dim")]
        for whole in rows:
            same = [whole.get(name) for name in ("peer", "batch", "heads", "kv_heads", "seq", "dim")] == sizes
            if row.get("window") and same and whole.get("window") is None and not {"skipped"} & (row.keys() | whole):
                shares = {
                    part: row[f"{part}_tflops"] / whole[f"{part}_tflops"]  # type: ignore[operator]
                    for part in ("forward", "backward")
                }
                said = " and ".join(f"{share:.2f} {part}" for part, share in shares.items())
                lines.append(f"{row['shape']:18} {row['peer']:8} {said} of the rate of {whole['shape']}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    about = "Attention kernels beside SDPA flash, SDPA cuDNN and FlexAttention"
    parser = kernel_parser("attention", about, [shape.name for shape in SHAPES], PEERS)
    parser.add_argument("--budget-ms", type=float, default=300.0, help="GPU time for each figure")
    args = parser.parse_args(argv)
    rows = run(args.only, args.peers.split(","), args.budget_ms)
    text = "\n".join([table(rows), *proportions(rows)])
    print_report("bf16, causal; TFLOP/s over visible pairs, medians", text, rows, args.json)


if __name__ == "__main__":
    run_script(main)
