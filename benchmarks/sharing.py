"""Whether attention stays right where several processes take turns on one GPU: calls that were wrong, by kernel.

Every process draws the same tensors and computes them with one kernel after the other, in step with the others; each
call is compared with what a process that was alone had computed. The Hopper kernels run here though the GPU is shared
(``REHEAD_GPU_ALONE=1``); cuDNN's and flash attention stand beside them.

    python -m rehead.benchmarks.sharing [--processes 3] [--seconds 7] [--length 17408] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.attention.kernels.device import ALONE
from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.errors import UnsupportedError
from rehead.models.live import resolve_device
from rehead.options import parse_count

BATCH, HEADS, KV_HEADS, DIM = 4, 9, 3, 64
#: Peaked scores, so that a tile in the wrong place cannot go unseen.
SCALE = 0.5
#: Largest difference of two right results in bfloat16.
TOLERANCE = 0.1


def draw(length: int, device: torch.device) -> AttentionCall:
    """A causal call, the same in every process."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(BATCH, length, heads * DIM, dtype=torch.float32)
        .to(device, dtype)
        .view(BATCH, length, heads, DIM)
        .transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return AttentionCall(query, key, value, causal=True, scale=SCALE)


def _torch(call: AttentionCall) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=True, scale=SCALE, enable_gqa=True
    )
    return out.transpose(1, 2)


Compute = Callable[[AttentionCall], Tensor]


def kernels(device: torch.device) -> dict[str, Compute]:
    """Ways to compute a call, [B, S, H, D], by name."""
    found: dict[str, Compute] = {"rehead": attend, "SDPA": _torch}
    if device.type != "cuda":
        return found

    from rehead.attention.kernels import general

    def through(backend: SDPBackend) -> Compute:
        def run(call: AttentionCall) -> Tensor:
            with sdpa_kernel(backend):
                return _torch(call)

        return run

    return {
        "rehead": attend,
        "rehead, general": lambda call: general.forward(call)[0],
        "SDPA cuDNN": through(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": through(SDPBackend.FLASH_ATTENTION),
    }


def count(
    compute: Callable[[AttentionCall], Tensor], call: AttentionCall, want: Tensor, until: float
) -> dict[str, Any]:
    """Calls until a time, the wrong ones and those that are not finite among them, and the largest error."""
    row = {"calls": 0, "wrong": 0, "not_finite": 0, "worst": 0.0}
    while time.time() < until:
        error = float((compute(call).float() - want.float()).abs().max())
        row["calls"] += 1
        row["wrong"] += not error < TOLERANCE  # what is no number is wrong
        row["not_finite"] += error != error or error == float("inf")
        row["worst"] = max(row["worst"], error if error == error else float("inf"))
    return row


def work(arguments: argparse.Namespace) -> None:
    """One of the processes: prints a line of JSON for each kernel."""
    device = resolve_device(arguments.device)
    call, want = draw(arguments.length, device), load_file(arguments.want)["out"].to(device)
    for number, (name, compute) in enumerate(kernels(device).items()):
        compute(call)  # compiles
        # Long enough after the start that all have compiled; from then on in step.
        began = arguments.start + number * (arguments.seconds + 1)
        time.sleep(max(0.0, began - time.time()))
        print(json.dumps({"kernel": name, **count(compute, call, want, began + arguments.seconds)}), flush=True)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes; a row for each kernel, summed over them.

    Raises:
        UnsupportedError: one of them failed.
    """
    device = resolve_device(arguments.device)
    call = draw(arguments.length, device)
    with tempfile.TemporaryDirectory() as folder:
        want = Path(folder) / "want.safetensors"
        save_file({"out": kernels(device)["rehead"](call).cpu().contiguous()}, want)
        del call
        if device.type == "cuda":
            torch.cuda.empty_cache()
        start = time.time() + arguments.compile
        command = [sys.executable, "-m", "rehead.benchmarks.sharing", "--want", str(want), "--start", str(start)]
        command += ["--device", str(device), "--length", str(arguments.length), "--seconds", str(arguments.seconds)]
        own = os.environ | {ALONE: "1"}
        running = [
            subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) for _ in range(arguments.processes)
        ]
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
