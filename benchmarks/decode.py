"""Claim: one decoding step reads the KV cache at close to the speed of a memory copy, padded or static, grouped or MQA.

Every case runs under a padding mask *and* with its fill read from the device, as under StaticCache, in CUDA graphs that
rotate through enough caches to defeat the L2. The share is (bytes of visible K and V) / time / (bandwidth of a large
device copy, bytes read plus written, measured in the same run). SDPA stands beside it, with the same mask and without,
timed in the same ways:

- ``share``: calls one after the other. The start of a call may overlap the end of the one before it.
- ``in step``: before each call the new token is written into the cache, as a decoding step does, and the time of a
  graph of the writes alone is subtracted. Nothing of a call can then be read before the write has ended.

    python -m rehead.benchmarks.decode [--only NAME] [--json FILE]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.benchmarks.attention import median_ms, require_cuda
from rehead.benchmarks.command import kernel_parser, print_report, run_script
from rehead.benchmarks.graphs import warm_up
from rehead.errors import check_names

HEADS = 32
DIM = 128
PEERS = ("rehead", "rehead no mask", "sdpa", "sdpa no mask")


@dataclass(frozen=True)
class Case:
    """One row: bf16, 32 query heads of 128, ``length`` cached keys in each of ``batch`` sequences."""

    name: str
    batch: int
    kv_heads: int
    length: int
    wanted: float

    @property
    def cache_bytes(self) -> int:
        """K and V of the whole cache."""
        return 2 * self.batch * self.kv_heads * self.length * DIM * 2


CASES = (
    Case("b16-kv8-8k", 16, 8, 8192, 0.85),
    Case("b16-kv1-8k", 16, 1, 8192, 0.75),
    Case("b1-kv8-32k", 1, 8, 32768, 0.80),
    Case("b1-kv1-32k", 1, 1, 32768, 0.50),
)


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a 2 GiB device-to-device copy (median)."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_(0, 100)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), 100) / 1e3)


def graphed_ms(calls: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Median milliseconds a call takes inside a CUDA graph that runs all of ``calls`` one after the other."""
    warm_up(lambda: [call() for call in calls], 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    del kept
    return statistics.median(times[3:])


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    offset: Tensor
    end: Tensor
    token: Tensor
    place: Tensor

    def write(self) -> None:
        """Store the step's key and value, as a static cache does."""
        self.key.index_copy_(2, self.place, self.token)
        self.value.index_copy_(2, self.place, self.token)


def _inputs(case: Case) -> Inputs:
    query = torch.randn(case.batch, 1, HEADS, DIM, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    size = (case.batch, case.kv_heads, case.length, DIM)
    key, value = (torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    mask = torch.ones(case.batch, case.length, dtype=torch.bool, device="cuda")
    mask[::2, :64] = False  # every other row is padded on the left
    end = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
    token = torch.randn(case.batch, case.kv_heads, 1, DIM, dtype=torch.bfloat16, device="cuda")
    return Inputs(query, key, value, mask, end - 1, end, token, end[:1].long() - 1)


def _in_step(item: Inputs, call: Callable[[], object]) -> Callable[[], object]:
    def step() -> object:
        item.write()
        return call()

    return step


def _call(peer: str, item: Inputs) -> Callable[[], Tensor]:
    from rehead.attention.kernels import decode

    if peer.startswith("rehead"):
        mask = None if peer.endswith("no mask") else item.mask
        return lambda: decode(
            item.query, item.key, item.value, scale=DIM**-0.5, q_offset=item.offset, kv_end=item.end, key_mask=mask
        )
    mask4 = None if peer.endswith("no mask") else item.mask[:, None, None, :]
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        item.query, item.key, item.value, attn_mask=mask4, enable_gqa=True
    ).transpose(1, 2)


def measure(case: Case, peer: str, bandwidth: float) -> dict[str, Any]:
    """One row: microseconds a call, bytes of visible cache per second, share of ``bandwidth``; timed both ways."""
    sets = max(2, min(16, int(4 * 60e6 / case.cache_bytes) + 1))
    inputs = [_inputs(case) for _ in range(sets)]
    calls = [_call(peer, item) for item in inputs]
    repeat = max(1, 16 // len(calls))
    milliseconds = graphed_ms(calls * repeat)
    steps = [_in_step(item, call) for item, call in zip(inputs, calls)]
    in_step = graphed_ms(steps * repeat) - graphed_ms([item.write for item in inputs] * repeat)
    visible = case.batch * case.length if peer.endswith("no mask") else int(inputs[0].mask.sum())
    read = 2 * visible * case.kv_heads * DIM * 2
    row: dict[str, Any] = {"case": case.name, "peer": peer}
    for suffix, time in (("", milliseconds), ("_in_step", in_step)):
        speed = read / (time / 1e3)
        row |= {f"us{suffix}": time * 1e3, f"bytes_per_s{suffix}": speed, f"share{suffix}": speed / bandwidth}
    if peer.startswith("rehead"):
        mask = None if peer.endswith("no mask") else inputs[0].mask[:, None, None, :]
        want = torch.nn.functional.scaled_dot_product_attention(
            inputs[0].query.float(), inputs[0].key.float(), inputs[0].value.float(), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)
        got = calls[0]().float()
        row["error"] = float((got - want).norm() / want.norm())
    return row | asdict(case)


def run(only: Sequence[str] | None = None, peers: Sequence[str] = PEERS) -> list[dict[str, Any]]:
    """All rows of the table; each also carries ``copy_bytes_per_s`` of the same run.

    Raises:
        UnsupportedError: no CUDA GPU.
        UsageError: a case or peer that does not exist.
    """
    require_cuda("decode")
    known = {case.name: case for case in CASES}
    check_names("case", only or (), known)
    check_names("peer", peers, PEERS)
    bandwidth = copy_bandwidth()
    rows = [measure(known[name], peer, bandwidth) for name in (only or known) for peer in peers]
    return [row | {"copy_bytes_per_s": bandwidth} for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one line each."""
    lines = [
        f"{'case':14} {'kernel':16} {'us':>9} {'TB/s':>7} {'share':>7} {'wanted':>7} {'us in step':>11} {'share':>7}"
    ]
    for row in rows:
        wanted = f"{row['wanted']:.2f}" if row["peer"] == "rehead" else ""
        lines.append(
            f"{row['case']:14} {row['peer']:16} {row['us']:9.1f} {row['bytes_per_s'] / 1e12:7.2f} "
            f"{row['share']:7.2f} {wanted:>7} {row['us_in_step']:11.1f} {row['share_in_step']:7.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    about = "Decode attention as a share of the copy bandwidth, beside SDPA"
    args = kernel_parser("decode", about, [case.name for case in CASES], PEERS).parse_args(argv)
    rows = run(args.only, args.peers.split(","))
    title = f"bf16, {HEADS} query heads of {DIM}; device copy {rows[0]['copy_bytes_per_s'] / 1e12:.2f} TB/s; medians"
    print_report(title, table(rows), rows, args.json)


if __name__ == "__main__":
    run_script(main)
