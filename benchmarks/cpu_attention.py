"""The CPU path beside PyTorch's SDPA as transformers calls it: time and extra memory, forward and backward, to 64k.

SDPA gets what transformers gives it: no mask and ``is_causal`` where the model is causal without padding, else a bool
mask of S x S with the KV heads repeated. Times are medians of interleaved rounds in one process. Memory is the peak of
the process during one forward and backward in a fresh process, less what it held before and less the results.

    rehead bench cpu
    python -m rehead.benchmarks.cpu_attention --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rehead.patches  # noqa: F401  (registers rehead_tiled)
from rehead.benchmarks.machine import headline, machine
from rehead.errors import UnsupportedError


@dataclass(frozen=True)
class Case:
    """One line of the table: a shape and a rule. Heads are H query heads over K KV heads of ``dim``, float32."""

    name: str
    length: int
    window: int | None = None
    padding: int = 0
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    peer: bool = True
    timed: bool = True


CASES = (
    Case("causal 4k", 4096),
    Case("causal 16k", 16384, heads=4, kv_heads=1),
    Case("window 1024, 4k", 4096, 1024),
    Case("window 1024, 16k", 16384, 1024),
    Case("left padding 1k, 4k", 4096, padding=1024),
    Case("window 1024, 32k", 32768, 1024, peer=False),
    Case("window 1024, 64k", 65536, 1024, peer=False),
    Case("causal 32k", 32768, heads=2, kv_heads=1, peer=False, timed=False),
)


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, case.dim))
    # The layout of a projection's output: [B, S, H, D] in memory.
    return tuple(  # type: ignore[return-value]
        torch.randn(1, case.length, h, d, generator=gen).transpose(1, 2).requires_grad_() for h, d in shapes
    )


def _padding(case: Case) -> Tensor | None:
    if not case.padding:
        return None
    mask = torch.ones(1, case.length, dtype=torch.bool)
    mask[:, : case.padding] = False
    return mask


def _masks(case: Case, implementation: str) -> Any:
    """What transformers makes of the case for an attention implementation, by its own functions."""
    from transformers import LlamaConfig, masking_utils

    config: Any = LlamaConfig()
    config.sliding_window = case.window
    config._attn_implementation = implementation
    create = masking_utils.create_sliding_window_causal_mask if case.window else masking_utils.create_causal_mask
    return create(config, torch.empty(1, case.length, 0), _padding(case), None)


def _module(case: Case) -> nn.Module:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.num_key_value_groups = case.heads // case.kv_heads  # type: ignore[assignment]
    return module.eval()


def _forward(case: Case, implementation: str, tensors: Sequence[Tensor]) -> Tensor:
    """One attention layer as a transformers model calls it, its mask included."""
    from transformers import AttentionInterface

    function = AttentionInterface()[implementation]
    mask = _masks(case, implementation)
    return function(_module(case), *tensors, mask, scaling=case.dim**-0.5)[0]


def _step(
    case: Case, implementation: str, tensors: Sequence[Tensor], grad: Tensor, clock: Callable[[], float]
) -> list[float]:
    """Seconds of the forward and of the backward."""
    start = clock()
    out = _forward(case, implementation, tensors)
    middle = clock()
    torch.autograd.grad(out, tensors, grad)
    return [middle - start, clock() - middle]


def measure_time(
    case: Case, implementations: Sequence[str], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Median seconds, forward and backward, of each implementation, in interleaved rounds."""
    tensors = _inputs(case)
    grad = torch.randn(1, case.length, case.heads, case.dim, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[list[float]]] = {name: [] for name in implementations}
    for index in range(rounds + 1):
        for name in implementations:
            seconds = _step(case, name, tensors, grad, clock)
            # The first round warms caches and allocators.
            if index or rounds == 1:
                times[name].append(seconds)
    return {name: [statistics.median(part) for part in zip(*runs, strict=True)] for name, runs in times.items()}


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise UnsupportedError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def _memory_worker(case: Case, implementation: str, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    small = Case("warm-up", 512, case.window and 64, case.padding and 64, case.heads, case.kv_heads, case.dim)
    for _ in range(2):
        _step(small, implementation, _inputs(small), torch.randn(1, 512, case.heads, case.dim), time.perf_counter)
    tensors = _inputs(case)
    grad = torch.randn(1, case.length, case.heads, case.dim)
    gc.collect()
    # Writing 5 resets the peak, so that what imports and inputs took does not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    out = _forward(case, implementation, tensors)
    grads = torch.autograd.grad(out, tensors, grad)
    peak = _status("VmHWM")
    results = sum(t.numel() * t.element_size() for t in (out, *grads))
    pipe.send((peak - before - results) / 1e6)


def measure_memory(case: Case, implementation: str, threads: int) -> float | None:
    """Extra MB of one forward and backward in a fresh process; None where the process did not survive it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_memory_worker, args=(case, implementation, threads, theirs))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError:
        return None
    finally:
        process.join()


def check(case: Case) -> float:
    """Largest difference between the two implementations on a short version of a case, forward and gradients."""
    short = Case(case.name, 600, case.window and 100, case.padding and 90, case.heads, case.kv_heads, case.dim)
    tensors = _inputs(short)
    keep = torch.ones(1, 600, dtype=torch.bool) if not short.padding else _padding(short)
    results = []
    for name in ("rehead_tiled", "sdpa"):
        out = _forward(short, name, tensors)[keep]
        grads = torch.autograd.grad(out.square().sum(), tensors)
        results.append([out, *grads])
    return max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))


def run(
    cases: Sequence[Case] = CASES,
    *,
    threads: int = 2,
    rounds: int = 3,
    memory: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure cases; each row has seconds, ratios, extra MB and the difference on a short version."""
    torch.set_num_threads(threads)
    rows = []
    for case in cases:
        if progress is not None:
            progress(case.name)
        row: dict[str, Any] = {**asdict(case), "difference": check(case)}
        names = ["rehead_tiled", *(["sdpa"] if case.peer else [])]
        if case.timed:
            times = measure_time(case, names, rounds, clock)
            row |= {f"{name} {part}": s for name in names for part, s in zip(("fwd", "bwd"), times[name], strict=True)}
            if case.peer:
                row["speedup"] = sum(times["sdpa"]) / sum(times["rehead_tiled"])
        if memory:
            row |= {f"{name} MB": measure_memory(case, name, threads) for name in names}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""

    def cell(row: dict[str, Any], name: str, digits: int = 2) -> str:
        value = row.get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    head = ("case", "H/K", "Rehead fwd s", "bwd s", "SDPA fwd s", "bwd s", "times", "Rehead MB", "SDPA MB", "differ")
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["name"],
                f"{row['heads']}/{row['kv_heads']}",
                cell(row, "rehead_tiled fwd"),
                cell(row, "rehead_tiled bwd"),
                cell(row, "sdpa fwd"),
                cell(row, "sdpa bwd"),
                cell(row, "speedup"),
                cell(row, "rehead_tiled MB", 0),
                cell(row, "sdpa MB", 0),
                f"{row['difference']:.0e}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def growth(rows: Sequence[dict[str, Any]]) -> str:
    """How the extra memory of Rehead grows with the length, for rules measured at several lengths: one line each."""
    measured: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("rehead_tiled MB") is not None:
            rule = f"{row['name'].split(',')[0]}, {row['heads']}/{row['kv_heads']} heads"
            measured.setdefault(rule, []).append((row["length"], row["rehead_tiled MB"]))
    lines = []
    for rule, points in measured.items():
        if len(points) > 1:
            parts = (
                f"{size:.0f} MB at {length // 1024}k ({1e3 * size / length:.1f} KB a token)" for length, size in points
            )
            lines.append(f"extra memory, {rule}: {', '.join(parts)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(prog="rehead bench cpu", description="Tiled attention on the CPU beside SDPA")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each case")
    parser.add_argument("--only", action="append", help="part of a case's name; repeatable")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU seconds instead of the clock's, for a machine that is shared; use --threads 1",
    )
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    chosen = [c for c in CASES if not args.only or any(part in c.name for part in args.only)]
    if not chosen:
        parser.error(f"no case matches; there are {', '.join(c.name for c in CASES)}")
    rows = run(
        chosen,
        threads=args.threads,
        rounds=args.rounds,
        memory=not args.no_memory,
        clock=time.process_time if args.cpu_time else time.perf_counter,
        progress=lambda name: print(f"... {name}", file=sys.stderr, flush=True),
    )
    load = f"{os.getloadavg()[0]:.1f}"
    facts = machine("cpu") | {"threads": args.threads, "load": load, "dtype": "float32"}
    print(headline(facts))
    if args.cpu_time:
        print("seconds are CPU seconds of the process")
    print(table(rows))
    if not args.no_memory and growth(rows):
        print(growth(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
