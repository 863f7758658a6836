"""Claim: a decoding step over latents reads its cache nearly as fast as memory, or as the matrix units, allow.

DeepSeek's sizes: a latent of 512 and a rotated key of 64 for all heads, bf16. Every cached number takes part in 2 x 2
operations for each head, so with 128 heads a step has 242 operations for each byte of the cache, more than an H200 does
in the time that it takes to read one. So beside the share of the copy bandwidth (bytes of the cache / time / bandwidth
of a large copy) stands the share of the bound, which is the longer of reading the cache once and of doing the products
at the rate of a large matrix product of the same run.

Peers: ``sdpa on heads`` attends over keys and values of all heads that are in memory already, 71 times as many bytes;
``expanded`` also makes them, at every step, as transformers does. ``flashmla`` runs where it is installed.

    rehead bench latent [--only NAME] [--json FILE]
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.benchmarks.attention import median_ms, require_cuda
from rehead.benchmarks.command import kernel_parser, print_report, run_script
from rehead.benchmarks.decode import copy_bandwidth, graphed_ms
from rehead.errors import check_names

RANK, TURNING, STILL, VALUE = 512, 64, 128, 128
PEERS = ("rehead", "rehead general", "flashmla", "sdpa on heads", "expanded")
PAGE = 64


@dataclass(frozen=True)
class Case:
    """``heads`` query heads over ``length`` cached latents in each of ``batch`` sequences; ``wanted`` share of copy."""

    name: str
    batch: int
    heads: int
    length: int
    wanted: float = 0.0

    @property
    def cache_bytes(self) -> int:
        """Of the whole cache."""
        return self.batch * self.length * (RANK + TURNING) * 2

    @property
    def flops(self) -> int:
        """Of a step over the latents."""
        return 2 * self.batch * self.length * self.heads * (2 * RANK + TURNING)


CASES = (
    Case("b16-h128-8k", 16, 128, 8192, 0.8),
    Case("b1-h128-32k", 1, 128, 32768, 0.7),
    Case("b16-h64-8k", 16, 64, 8192),
    Case("b16-h32-8k", 16, 32, 8192),
    Case("b1-h32-32k", 1, 32, 32768),
    Case("b64-h16-8k", 64, 16, 8192),
)


def matrix_rate() -> float:
    """Operations per second of a product of two random bf16 matrices of 8192 x 8192 (median)."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / (median_ms(lambda: left @ right, 100) / 1e3)


@dataclass(frozen=True)
class Inputs:
    """One set of random tensors; the cache is one buffer [B, T, 576], of which latents and keys are views."""

    query: Tensor
    cache: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, T, 512] and rotated keys [B, 1, T, 64]."""
        return self.cache[:, None, :, :RANK], self.cache[:, None, :, RANK:]


def _inputs(case: Case) -> Inputs:
    make = lambda *size: torch.randn(*size, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    return Inputs(make(case.batch, case.heads, 1, RANK + TURNING), make(case.batch, case.length, RANK + TURNING))


def _scale() -> float:
    return (STILL + TURNING) ** -0.5


def _rehead(item: Inputs, general: bool) -> Callable[[], Tensor]:
    from rehead.attention import kernels

    latents, tail = (part.contiguous() for part in item.parts)  # two tensors, as transformers' caches hold them
    call = AttentionCall(
        item.query, latents, latents, key_tail=tail, scale=_scale(), q_offset=latents.shape[2] - 1, causal=True
    )
    if general:  # a mask that hides nothing
        seen = torch.ones(latents.shape[0], latents.shape[2], dtype=torch.bool, device="cuda")
        call = call.with_(key_mask=seen)
    return lambda: kernels.decode_call(call)


def _flash_mla(item: Inputs) -> Callable[[], Tensor]:
    import flash_mla

    batch, length, width = item.cache.shape
    pages = item.cache.view(-1, PAGE, 1, width)
    table = torch.arange(len(pages), dtype=torch.int32, device="cuda").view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    heads = item.query.shape[1]
    plan, counts = flash_mla.get_mla_metadata(lengths, heads, 1)
    more = (
        {"use_legacy": True} if "use_legacy" in inspect.signature(flash_mla.flash_mla_with_kvcache).parameters else {}
    )
    query = item.query.transpose(1, 2).contiguous()
    return lambda: flash_mla.flash_mla_with_kvcache(
        query, pages, table, lengths, RANK, plan, counts, softmax_scale=_scale(), causal=False, **more
    )[0]


def _on_heads(item: Inputs, expands: bool) -> Callable[[], Tensor]:
    """Attention of every head over its own keys and values."""
    heads = item.query.shape[1]
    up = torch.randn(heads * (STILL + VALUE), RANK, dtype=torch.bfloat16, device="cuda") * RANK**-0.5
    query = item.query[..., : STILL + TURNING].contiguous()

    def heads_of() -> tuple[Tensor, Tensor]:
        latents, tail = item.parts
        both = torch.nn.functional.linear(latents[:, 0], up).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = torch.cat([both[..., :STILL], tail.expand(-1, heads, -1, -1)], -1)
        return key, both[..., STILL:]

    kept = None if expands else tuple(part.contiguous() for part in heads_of())

    def step() -> Tensor:
        key, value = heads_of() if kept is None else kept
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=_scale())

    return step


def _call(peer: str, item: Inputs) -> Callable[[], Tensor]:
    if peer.startswith("rehead"):
        return _rehead(item, peer.endswith("general"))
    return _flash_mla(item) if peer == "flashmla" else _on_heads(item, peer == "expanded")


def _error(item: Inputs, out: Tensor) -> float:
    """Relative error against float32."""
    query, cache = item.query[:, :, 0].float(), item.cache.float()
    want = torch.empty(*query.shape[:2], RANK, device="cuda")
    for row in range(len(query)):
        weights = torch.softmax(query[row] @ cache[row].T * _scale(), -1)
        want[row] = weights @ cache[row, :, :RANK]
    got = out.float().reshape(want.shape)
    return float((got - want).norm() / want.norm())


def measure(case: Case, peer: str, bandwidth: float, rate: float) -> dict[str, Any]:
    """One row: microseconds per step, shares of the copy bandwidth and of the bound, the error of Rehead's kernels."""
    big = peer in ("sdpa on heads", "expanded")
    sets = 1 if big else max(2, min(16, int(4 * 60e6 / case.cache_bytes) + 1))
    inputs = [_inputs(case) for _ in range(sets)]
    calls = [_call(peer, item) for item in inputs]
    milliseconds = median_ms(calls[0], 100) if big else graphed_ms(calls * max(1, 16 // sets))
    seconds = milliseconds / 1e3
    bound = max(case.cache_bytes / bandwidth, case.flops / rate)
    row: dict[str, Any] = {"case": case.name, "peer": peer, "us": milliseconds * 1e3}
    row |= {"share": case.cache_bytes / seconds / bandwidth, "bound_share": bound / seconds}
    row |= {"flops_per_s": case.flops / seconds}
    if not big:
        row["error"] = _error(inputs[0], calls[0]())
    return row | asdict(case)


def run(only: Sequence[str] | None = None, peers: Sequence[str] = PEERS) -> list[dict[str, Any]]:
    """All rows of the table, with ``copy_bytes_per_s`` and ``matrix_flops_per_s`` of the same run.

    Raises:
        UnsupportedError: no CUDA GPU.
        UsageError: a case or peer that does not exist.
    """
    require_cuda("latent")
    known = {case.name: case for case in CASES}
    check_names("case", only or (), known)
    check_names("peer", peers, PEERS)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    rows = []
    for name in only or known:
        for peer in peers:
            if peer == "flashmla" and (importlib.util.find_spec("flash_mla") is None or known[name].heads % 64):
                continue
            try:
                row = measure(known[name], peer, bandwidth, rate)
            except (RuntimeError, ImportError, torch.OutOfMemoryError) as error:
                row = {"case": name, "peer": peer, "failed": str(error).strip().splitlines()[0][:200]}
            torch.cuda.empty_cache()
            rows.append(row | {"copy_bytes_per_s": bandwidth, "matrix_flops_per_s": rate})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one line each."""
    lines = [
        f"{'case':14} {'kernel':16} {'us':>9} {'TFLOP/s':>8} {'of copy':>8} {'of bound':>9} {'wanted':>7} {'error':>8}"
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['case']:14} {row['peer']:16} {row['failed']}")
            continue
        wanted = f"{row['wanted']:.2f}" if row["peer"] == "rehead" and row["wanted"] else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(
            f"{row['case']:14} {row['peer']:16} {row['us']:9.1f} {row['flops_per_s'] / 1e12:8.0f} {row['share']:8.3f} "
            f"{row['bound_share']:9.2f} {wanted:>7} {error:>8}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    about = "Decode over latents beside expanded heads and FlashMLA"
    args = kernel_parser("latent", about, [case.name for case in CASES], PEERS).parse_args(argv)
    rows = run(args.only, args.peers.split(","))
    rates = rows[0]["copy_bytes_per_s"] / 1e12, rows[0]["matrix_flops_per_s"] / 1e12
    title = f"bf16, latents of {RANK} + {TURNING}; copy {rates[0]:.2f} TB/s, product {rates[1]:.0f} TFLOP/s; medians"
    print_report(title, table(rows), rows, args.json)


if __name__ == "__main__":
    run_script(main)
