"""Claim: parallel blocks train and decode faster than serial ones, most of all under tensor parallelism.

PaLM reports 15% faster training from parallel blocks (arXiv 2204.02311). That is a tensor-parallel figure: one
all-reduce a layer in place of two. This measures stacks of LLaMA's parts (RMS norm, rotary grouped attention, gated
FFN) in both forms, each in every variant that may be its best: products separate or fused, attention and FFN of a
parallel block one after the other or side by side, element-wise pieces compiled or not, collectives plain or overlapped
with products, PyTorch's DTensor beside collectives by hand. A training step is
forward and backward, a decode step one token behind a filled cache; both are replayed as CUDA graphs. The speed-up is
the best parallel variant's over the best serial one's.

    rehead bench blocks                                                     # one GPU
    torchrun --nproc-per-node 4 -m rehead.cli bench blocks --hidden 2048,4096    # tensor parallel over four
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from rehead.benchmarks.block_model import FORMS, HEAD_DIM, Shape
from rehead.benchmarks.block_variants import Bench, Variant, variants
from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.errors import UnsupportedError, UsageError

KV_HEADS = {"mha": None, "gqa": 8, "mqa": 1}
STEPS = ("train", "decode")
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The fastest first, the same for both forms."""

_COUNTS = ("layers", "batch", "length", "decode_batch", "context", "head_dim")


@dataclass
class Row:
    """One measurement: median milliseconds of a step, and the spread (half the interquartile range) as a share."""

    hidden: int
    kv_heads: int
    ranks: int
    step: str
    form: str
    products: str
    compiled: str
    collectives: str
    milliseconds: float = 0.0
    spread: float = 0.0
    graph: bool = False
    tflops: float | None = None
    skipped: str | None = None


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each shape and step: the best serial and the best parallel variant, and how much faster the latter is.

    ``plain`` is the same among variants without overlapped collectives, which is what the published figure compares.
    """
    found = []
    for key in dict.fromkeys((row.hidden, row.kv_heads, row.ranks, row.step) for row in rows):
        mine = [r for r in rows if (r.hidden, r.kv_heads, r.ranks, r.step) == key and r.skipped is None]
        best = {form: min((r for r in mine if r.form == form), key=_milliseconds, default=None) for form in FORMS}
        serial, parallel = best["serial"], best["parallel"]
        if serial is None or parallel is None:
            continue
        fact: dict[str, Any] = dict(zip(("hidden", "kv_heads", "ranks", "step"), key))
        fact |= {
            "serial_ms": serial.milliseconds,
            "serial": how(serial),
            "parallel_ms": parallel.milliseconds,
            "parallel": how(parallel),
            "speedup": serial.milliseconds / parallel.milliseconds,
        }
        plain = [r for r in mine if r.collectives in ("none", "plain")]
        if all(any(r.form == form for r in plain) for form in FORMS):
            first, second = (min(r.milliseconds for r in plain if r.form == form) for form in FORMS)
            fact["plain_speedup"] = first / second
        found.append(fact)
    return found


def _milliseconds(row: Row) -> float:
    return row.milliseconds


def how(row: Row) -> str:
    parts = [row.products, *([f"{row.compiled} compiled"] if row.compiled != "no" else [])]
    return ", ".join([*parts, *([row.collectives] if row.collectives != "none" else [])])


def markdown(facts: Sequence[dict[str, Any]]) -> str:
    """The summary as a table."""
    lines = [
        "| hidden | KV heads | GPUs | step | best serial, ms | best parallel, ms | speed-up | without overlap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in facts:
        plain = f"{f['plain_speedup']:.2f}" if "plain_speedup" in f else ""
        lines.append(
            f"| {f['hidden']} | {f['kv_heads']} | {f['ranks']} | {f['step']} | {f['serial_ms']:.3f} ({f['serial']}) | "
            f"{f['parallel_ms']:.3f} ({f['parallel']}) | {f['speedup']:.2f} | {plain} |"
        )
    return "\n".join(lines)


def measure(bench: Bench, shape: Shape, kind: str, tried: Sequence[Variant]) -> list[Row]:
    """Rows of every variant at one shape; one that cannot run has the reason in place of a time."""
    rows, steps, timed = [], [], []
    for variant in tried:
        row = Row(shape.hidden, shape.kv_heads, bench.size, kind, **asdict(variant))
        rows.append(row)
        try:
            step, row.graph = bench.captured(bench.step(variant, shape, kind))
        except (RuntimeError, UnsupportedError, NotImplementedError) as error:
            row.skipped = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            continue
        steps.append(step)
        timed.append(row)
    for row, taken in zip(timed, bench.times(steps)):
        middle = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4)
        row.milliseconds, row.spread = middle, (high - low) / 2 / middle
        if kind == "train":
            row.tflops = shape.training_flops() / bench.size / middle / 1e9
    del steps
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} takes whole numbers separated by commas, not {text!r}") from None


def _choices(text: str, flag: str, known: Sequence[str]) -> list[str]:
    for name in text.split(","):
        if name not in known:
            raise UsageError(f"{flag}: {name!r} is none of {', '.join(known)}")
    return text.split(",")


def shapes(args: argparse.Namespace, size: int) -> list[Shape]:
    """The table's shapes.

    Raises:
        UsageError: a size below 1, or one that heads or ranks do not divide.
    """
    made, sizes = [], _numbers(args.hidden, "--hidden")
    given = {"--hidden": min(sizes)} | {f"--{name.replace('_', '-')}": getattr(args, name) for name in _COUNTS}
    for flag, value in given.items():
        if value < 1:
            raise UsageError(f"{flag} {value}: must be 1 or more")
    for hidden in sizes:
        if hidden % args.head_dim or (hidden // args.head_dim) % size:
            raise UsageError(f"--hidden {hidden}: its heads of {args.head_dim} do not divide over {size} ranks")
        heads = hidden // args.head_dim
        for name in _choices(args.kv, "--kv", list(KV_HEADS)):
            kv_heads = min(KV_HEADS[name] or heads, heads)
            if kv_heads > 1 and kv_heads % size:
                raise UsageError(f"--kv {name}: {kv_heads} KV heads do not divide over {size} ranks; leave it out")
            made.append(Shape(hidden, kv_heads, args.layers, args.batch, args.length, args.head_dim))
    return list(dict.fromkeys(made))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rehead bench blocks", description="Serial beside parallel blocks.")
    parser.add_argument("--hidden", default="1024,2048,4096,8192", help="hidden sizes (default: %(default)s)")
    parser.add_argument("--kv", default="gqa,mqa", help="mha, gqa (8 KV heads), mqa (default: %(default)s)")
    parser.add_argument("--steps", default="train,decode", help="train, decode (default: %(default)s)")
    parser.add_argument("--compile", default="no,pieces,block", help="no, pieces, block (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="only the variants that win somewhere")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a training step")
    parser.add_argument("--length", type=int, default=2048, help="their tokens")
    parser.add_argument("--decode-batch", type=int, default=16, help="sequences in a decode step")
    parser.add_argument("--context", type=int, default=4096, help="tokens in their caches")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each figure")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, over gloo: a trial, not a measurement")
    parser.add_argument("--json", help="also write machine, rows and summary to this file")
    return parser


def run(args: argparse.Namespace, bench: Bench) -> list[Row]:
    """Every shape, step and variant that was asked for."""
    compiled = _choices(args.compile, "--compile", ("no", "pieces", "block"))
    kinds = _choices(args.steps, "--steps", STEPS)
    rows: list[Row] = []
    for shape in shapes(args, bench.size):
        for kind in kinds:
            sized = shape
            if kind == "decode":
                sized = Shape(**{**shape.__dict__, "batch": args.decode_batch, "length": args.context})
            made = measure(bench, sized, kind, variants(kind, bench.size, shape.kv_heads, compiled, not args.short))
            rows += made
            if bench.index == 0:
                for row in made:
                    took = f"{row.milliseconds:9.3f} ms +-{row.spread:.1%}" if row.skipped is None else row.skipped
                    speed = f" {row.tflops:5.0f} TFLOP/s" if row.tflops else ""
                    name = f"{row.form:8} {how(row):36}"
                    print(f"n {row.hidden:5} kv {row.kv_heads:2} {row.step:6} {name} {took}{speed}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line.

    Raises:
        UnsupportedError: no GPU, and no ``--cpu``.
        UsageError: sizes that do not divide.
    """
    args = _parser().parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        raise UnsupportedError("the blocks benchmark measures GPUs and this machine has none; --cpu tries it out")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if args.cpu else torch.device("cuda", local)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    shapes(args, int(os.environ.get("WORLD_SIZE", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("gloo" if args.cpu else "nccl", device_id=None if args.cpu else device)
    try:
        bench = Bench(device, torch.float32 if args.cpu else torch.bfloat16, args.seconds)
        with sdpa_kernel(ATTENTION, set_priority=True):
            rows = run(args, bench)
        facts, what = summary(rows), machine(device) | {"ranks": bench.size}
        if bench.index == 0:
            print(headline(what))
            print(
                f"{args.layers} blocks; train: forward and backward of {args.batch} x {args.length} tokens; decode: "
                f"{args.decode_batch} sequences after {args.context} tokens"
            )
            print(markdown(facts))
            if args.json:
                report = {"machine": what, "setting": vars(args), "summary": facts, "rows": [asdict(r) for r in rows]}
                Path(args.json).write_text(json.dumps(report, indent=1))
    finally:
        if several:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
