"""Whether attention stays right where several processes take turns on one GPU: calls that were wrong, by kernel.

Every process draws the same tensors and computes them with one kernel after the other, in step with the others; each
call is compared with what a process that was alone had computed, and starts with memory full of NaN, so that a part of
the output that no program wrote shows. cuDNN's and flash attention stand beside ours.

    python -m rehead.benchmarks.sharing [--processes 3] [--seconds 7] [--length 17408] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rehead.attention.attend import attention
from rehead.attention.call import AttentionCall
from rehead.benchmarks.attention import Shape, peer_call
from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.counts import parse_count
from rehead.errors import UnsupportedError
from rehead.models.live import resolve_device

BATCH, HEADS, KV_HEADS, DIM = 4, 9, 3, 64
#: Largest difference of two right results in bfloat16.
TOLERANCE = 0.1

Inputs = tuple[Tensor, Tensor, Tensor]
Compute = Callable[..., Tensor]


def draw(length: int, device: torch.device) -> Inputs:
    """Query, key and value, the same in every process; scores are peaked, so that a tile out of place shows."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(BATCH, length, heads, DIM).to(device, dtype).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return query * 2, key * 2, value


def kernels(length: int, device: torch.device) -> dict[str, Compute]:
    """What computes causal attention, [B, S, H, D], by name; Rehead's own choice first."""
    shape = Shape("shared", BATCH, HEADS, KV_HEADS, length, DIM)
    own = functools.partial(attention, scale=DIM**-0.5, causal=True)
    if device.type != "cuda":
        return {"rehead": own, "math": peer_call("math", shape)}

    from rehead.attention.kernels import general

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return general.forward(AttentionCall(query, key, value, causal=True, scale=DIM**-0.5))[0]

    return {"rehead": own, "general": plain, "cudnn": peer_call("cudnn", shape), "flash": peer_call("flash", shape)}


def count(compute: Compute, inputs: Inputs, want: Tensor, until: float) -> dict[str, Any]:
    """Calls until a time, the wrong ones and those that are not finite among them, and the largest error."""
    row = {"calls": 0, "wrong": 0, "not_finite": 0, "worst": 0.0}
    while time.time() < until:
        torch.full_like(want, float("nan"))  # freed at once: the next output of this size is made where it was
        error = float((compute(*inputs).float() - want.float()).abs().max())
        row["calls"] += 1
        row["wrong"] += not error < TOLERANCE  # what is no number is wrong
        row["not_finite"] += error != error or error == float("inf")
        row["worst"] = max(row["worst"], error if error == error else float("inf"))
    return row


def work(arguments: argparse.Namespace) -> None:
    """One of the processes: prints a line of JSON for each kernel."""
    device = resolve_device(arguments.device)
    inputs, want = draw(arguments.length, device), load_file(arguments.want)["out"].to(device)
    for number, (name, compute) in enumerate(kernels(arguments.length, device).items()):
        compute(*inputs)  # compiles
        # Long enough after the start that all have compiled; from then on in step.
        began = arguments.start + number * (arguments.seconds + 1)
        time.sleep(max(0.0, began - time.time()))
        print(json.dumps({"kernel": name, **count(compute, inputs, want, began + arguments.seconds)}), flush=True)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes; a row for each kernel, summed over them.

    Raises:
        UnsupportedError: one of them failed.
    """
    device = resolve_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        want = Path(folder) / "want.safetensors"
        out = kernels(arguments.length, device)["rehead"](*draw(arguments.length, device))
        save_file({"out": out.cpu().contiguous()}, want)
        del out
        if device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.time() + arguments.compile
        command = [sys.executable, "-m", "rehead.benchmarks.sharing", "--want", str(want), "--start", str(start)]
        command += ["--device", str(device), "--length", str(arguments.length), "--seconds", str(arguments.seconds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(arguments.processes)]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise UnsupportedError("a process of this benchmark failed; what it said stands above")
    rows: dict[str, dict[str, Any]] = {}
    for found in (json.loads(line) for text in outputs for line in text.splitlines()):
        row = rows.setdefault(found["kernel"], {"kernel": found["kernel"], "calls": 0, "wrong": 0, "not_finite": 0})
        for name in ("calls", "wrong", "not_finite"):
            row[name] += found[name]
        row["worst"] = max(row.get("worst", 0.0), found["worst"])
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.sharing", description=summary)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=7.0, help="of each kernel")
    parser.add_argument("--length", type=parse_count, default=17408, help="tokens of each of the 4 texts in a call")
    parser.add_argument("--compile", type=float, default=30.0, help="seconds for every process to start and compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--want", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.want:
        work(arguments)
        return
    rows, facts = measure(arguments), machine(resolve_device(arguments.device))
    echo(headline(facts))
    echo(f"{arguments.processes} processes, {BATCH} x {arguments.length} tokens, {HEADS} heads of {DIM}, causal")
    table: list[list[str]] = [["kernel", "calls", "wrong", "not finite", "largest error"]]
    table += [[row["kernel"], *(str(row[name]) for name in ("calls", "wrong", "not_finite")), f"{row['worst']:.3g}"]
              for row in rows]  # fmt: skip
    print_columns(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    run_script(main)
