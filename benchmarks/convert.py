"""Conversion speed and memory: `rehead convert` beside `cp` and beside the script everybody writes first.

A synthetic sharded LLaMA (random BF16 weights) is written to disk, then, in turn and from a cold page cache:

* ``cp`` of the weight files followed by fsync of each: the speed of the disk;
* ``rehead convert --method mean``, in a process of its own;
* ``from_pretrained``, pool, ``save_pretrained``, in a process of its own (``--naive``).

    python -m rehead.benchmarks.convert --gb 2 4 8 --repeat 3 --naive

Bytes per second are source bytes over wall-clock time from start of the process to its end, imports included. Peak
memory is the kernel's own figure for the process (``ru_maxrss``), which leaves the page cache out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rehead.benchmarks.machine import headline, machine
from rehead.checkpoints.safetensors_io import header_bytes

HIDDEN, INNER, HEADS, VOCAB = 4096, 11008, 32, 32000
SHARD_BYTES = 2_000_000_000
PIECE = 32 << 20

NAIVE = """
import sys, torch
from transformers import AutoModelForCausalLM
src, out, kv = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16)
config = model.config
head_dim = config.hidden_size // config.num_attention_heads
for layer in model.model.layers:
    for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        w = proj.weight.data
        proj.weight.data = w.view(kv, -1, head_dim, w.shape[1]).float().mean(1).reshape(kv * head_dim, -1).to(w.dtype)
        proj.out_features = kv * head_dim
config.num_key_value_heads = kv
model.save_pretrained(out, max_shard_size="2GB")
"""


@dataclass(frozen=True)
class Run:
    """One measured process: wall-clock and processor seconds, and peak resident bytes."""

    seconds: float
    cpu: float
    peak: int


def layer_shapes(i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer."""
    p = f"model.layers.{i}."
    return {
        p + "input_layernorm.weight": (HIDDEN,),
        p + "mlp.down_proj.weight": (HIDDEN, INNER),
        p + "mlp.gate_proj.weight": (INNER, HIDDEN),
        p + "mlp.up_proj.weight": (INNER, HIDDEN),
        p + "post_attention_layernorm.weight": (HIDDEN,),
        **{p + f"self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "kovq"},
    }


def nbytes(shape: Sequence[int]) -> int:
    """BF16 bytes of a tensor."""
    n = 2
    for d in shape:
        n *= d
    return n


def write_model(folder: Path, gb: float) -> int:
    """Write a sharded LLaMA of about ``gb`` GB, never holding more than a piece of it; returns its bytes of weights."""
    per_layer = sum(nbytes(s) for s in layer_shapes(0).values())
    ends = (
        {"model.embed_tokens.weight": (VOCAB, HIDDEN)},
        {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)},
    )
    outer = sum(nbytes(s) for end in ends for s in end.values())
    layers = max(1, round((gb * 1e9 - outer) / per_layer))
    shapes: dict[str, tuple[int, ...]] = dict(ends[0])
    for i in range(layers):
        shapes |= layer_shapes(i)
    shapes |= ends[1]

    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        if held + nbytes(shape) > SHARD_BYTES:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += nbytes(shape)

    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    pieces = random_pieces()
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        with open(folder / file, "wb", buffering=0) as f:
            f.write(header_bytes(((n, "BF16", s) for n, s in group.items()), {"format": "pt"}))
            left = sum(nbytes(s) for s in group.values())
            while left:
                piece = next(pieces)[:left]
                f.write(piece)
                left -= len(piece)
            os.fsync(f.fileno())
        weight_map |= dict.fromkeys(group, file)
    total = sum(nbytes(s) for s in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def random_pieces(seed: int = 0) -> Iterator[memoryview]:
    """Endless pieces of random, finite BF16 numbers between 2^-10 and 2^-6, either sign."""
    import numpy as np

    rng = np.random.default_rng(seed)
    while True:
        bits = rng.integers(0, 1 << 16, PIECE // 2, dtype=np.uint16)
        exponent = (np.uint16(117) + (bits >> np.uint16(7) & np.uint16(3))) << np.uint16(7)
        yield memoryview((bits & np.uint16(0x807F) | exponent).view(np.uint8))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that every run reads the disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(command: list[str], folder: Path, cold: bool) -> Run:
    """Run a command and measure it.

    Raises:
        SystemExit: it failed.
    """
    if cold:
        forget(folder)
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command[:4])} failed: {log.read().decode(errors='replace')[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def commands(src: Path, out: Path, kv_heads: int, naive: bool) -> dict[str, list[str]]:
    """What is measured, by name."""
    files = sorted(str(p) for p in src.glob("*.safetensors"))
    copy = 'out=$1; shift; mkdir "$out" && cp "$@" "$out" && sync "$out"/*'
    table = {
        "cp + fsync": ["sh", "-c", copy, "sh", str(out), *files],
        "rehead convert": [
            sys.executable, "-m", "rehead.cli", "convert", str(src), str(out), "--kv-heads", str(kv_heads),
            "--method", "mean", "--json",
        ],
    }  # fmt: skip
    if naive:
        table["load, pool, save_pretrained"] = [sys.executable, "-c", NAIVE, str(src), str(out), str(kv_heads)]
    return table


def bench(root: Path, gb: float, args: argparse.Namespace) -> dict[str, object]:
    """Measure one size; returns the figures printed."""
    src, out = root / "source", root / "out"
    # In a process of its own: a child's ru_maxrss starts from its parent's, so this one must stay small.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        total = pool.apply(write_model, (src, gb))
    try:
        results: dict[str, list[Run]] = {}
        for i in range(args.repeat):
            for name, command in commands(src, out, args.kv_heads, args.naive and i == 0).items():
                results.setdefault(name, []).append(run(command, src, not args.warm))
                shutil.rmtree(out)
    finally:
        shutil.rmtree(src, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    base = statistics.median(r.seconds for r in results["cp + fsync"])
    rows: dict[str, object] = {}
    cache = "warm" if args.warm else "cold"
    print(f"\n{total / 1e9:.2f} GB in {args.repeat} round(s), {cache} page cache")
    print(f"{'':<30}{'seconds (each run)':<28}{'GB/s':>7}{'of cp':>8}{'CPU s':>8}{'peak MB':>10}", flush=True)
    for name, runs in results.items():
        seconds = statistics.median(r.seconds for r in runs)
        peak = max(r.peak for r in runs)
        cpu = statistics.median(r.cpu for r in runs)
        each = " ".join(f"{r.seconds:.2f}" for r in runs)
        print(
            f"{name:<30}{each:<28}{total / seconds / 1e9:>7.2f}{base / seconds:>8.2f}{cpu:>8.1f}{peak / 1e6:>10.0f}",
            flush=True,
        )
        rows[name] = {
            "seconds": [r.seconds for r in runs],
            "share_of_cp": base / seconds,
            "cpu_seconds": cpu,
            "peak_bytes": peak,
        }
    return {"bytes": total, "runs": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[2, 8], help="sizes of the synthetic model, in GB")
    parser.add_argument("--kv-heads", type=int, default=8, help=f"KV heads of the result (the model has {HEADS})")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts")
    parser.add_argument(
        "--naive", action="store_true", help="also load, pool and save_pretrained, once; needs the memory"
    )
    parser.add_argument("--warm", action="store_true", help="leave the source in the page cache")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    print(headline(machine("cpu") | {"CPUs": os.cpu_count(), "system": platform.release()}))
    found = {}
    for gb in args.gb:
        with tempfile.TemporaryDirectory(prefix="rehead-bench-", dir=args.folder) as root:
            found[str(gb)] = bench(Path(root), gb, args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
