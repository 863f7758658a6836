"""What refit and fit of a large model take: seconds, GPU memory and the host's.

::

    python -m rehead.benchmarks.recovering [--shape 7b] [--layers 32] [--forms svd,latent] [--device-memory 22GiB]
        [--fit 300] [--json FILE]

A LLaMA with random weights in bfloat16 is written to a temporary folder and converted with refit and fit, on random
tokens: what it loses says nothing, what it takes is a real model's. The host's memory counts pages of the weights' file
that happen to be mapped. ``accelerate launch --num_processes 2 -m rehead.benchmarks.recovering ...`` measures processes
that share the text; memory is then the main one's.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.benchmarks.prefill import SHAPES, random_model
from rehead.checkpoints.shards import parse_size
from rehead.console import echo, print_columns, progress_bar
from rehead.convert import convert
from rehead.errors import check_names
from rehead.models.device_memory import memory_limited
from rehead.models.ranks import Ranks, join_ranks


def forms(shape: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Options of a conversion by its name: an eighth of the cache for KV heads, about as much for a latent."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    pairs = width // heads // 4 * 2
    kv = max(1, heads // 8)
    return {
        "svd": {"num_key_value_heads": kv, "method": "svd"},
        "latent": {"latent": 2 * kv * width // heads - pairs, "rope_dims": pairs},
    }


def recover(source: Path, out: Path, limit: int | None, ranks: Ranks, **options: Any) -> dict[str, Any]:
    """Convert once; seconds and bytes."""
    device = ranks.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ranks.wait()
    started = time.perf_counter()
    with memory_limited(device, limit), progress_bar(not ranks.main) as progress:
        convert(source, out, device=str(device), refit=True, calibration=["random"], progress=progress, **options)
    return {
        "seconds": time.perf_counter() - started,
        "allocated": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.recovering", description=summary)
    parser.add_argument("--shape", default="7b", help=f"one of {', '.join(SHAPES)}; each query head gets a KV head")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--forms", default="svd,latent", help="with commas between")
    parser.add_argument("--fit", type=int, default=300, help="steps")
    parser.add_argument("--calibration-tokens", type=int, help="as convert's by default")
    parser.add_argument("--device-memory", help="take no more of the GPU's, e.g. 22GiB")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="also write the rows to this file")
    asked = parser.parse_args(arguments)
    check_names("--shape", [asked.shape], SHAPES)
    ranks, every = join_ranks(asked.device), forms(SHAPES[asked.shape])
    check_names("--forms", asked.forms.split(","), every)
    limit = parse_size(asked.device_memory, "--device-memory") if asked.device_memory else None
    rows: list[dict[str, Any]] = []
    with ranks.announced(), tempfile.TemporaryDirectory() as own:
        if ranks.main:
            heads = SHAPES[asked.shape]["num_attention_heads"]
            model = random_model(asked.shape, ranks.device, num_hidden_layers=asked.layers, num_key_value_heads=heads)
            model.save_pretrained(Path(own) / "source")
            del model
        folder = ranks.from_main(lambda: own)
        for form in asked.forms.split(","):
            options = {**every[form], "fit": asked.fit}
            if asked.calibration_tokens:
                options["calibration_tokens"] = asked.calibration_tokens
            taken = recover(Path(folder) / "source", Path(folder) / form, limit, ranks, **options)
            about = {"shape": asked.shape, "layers": asked.layers, "form": form, "processes": ranks.world}
            rows.append({**about, **taken})
    if not ranks.main:
        return
    facts = machine(ranks.device)
    echo(headline(facts))
    table = [["shape", "layers", "form", "processes", "seconds", "a layer", "GPU GiB", "with its cache", "host GiB"]]
    for row in rows:
        sizes = [f"{row[key] / 2**30:.1f}" for key in ("allocated", "reserved", "host")]
        layer = f"{row['seconds'] / row['layers']:.1f}"
        first = [row["shape"], str(row["layers"]), row["form"], str(row["processes"])]
        table.append([*first, f"{row['seconds']:.0f}", layer, *sizes])
    print_columns(table)
    if asked.json:
        Path(asked.json).write_text(json.dumps({"machine": facts, "limit": limit, "rows": rows}, indent=1))


if __name__ == "__main__":
    run_script(main)
