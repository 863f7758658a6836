"""Prefill of long prompts by patches that read beyond the trained length, beside plain tiled attention.

::

    python -m rehead.benchmarks.prefill [--shapes 7b,smollm2] [--lengths 32Ki,64Ki,128Ki] [--json FILE]

Models with random weights in bfloat16, trained at 8,192 tokens by their config, one text, a cache that is filled. Time
is the best of two runs after a first; memory is the most that a run takes beyond the model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.counts import parse_count
from rehead.errors import check_names
from rehead.models.live import resolve_device
from rehead.patches import patch_model

TRAINED = 8192
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64},
}  # fmt: skip
"""Widths of a 7B model in four layers, SmolLM2-135M's, and one for a try without a GPU."""
METHODS = ("tiled", "dual_chunk", "self_extend")


def random_model(shape: str, device: torch.device, **sizes: int) -> Any:
    """A model of random weights, in bfloat16; ``sizes`` replace the shape's."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=TRAINED, **{**SHAPES[shape], **sizes})  # type: ignore[arg-type]
    with device:
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def prefill(model: Any, method: str, tokens: torch.Tensor) -> tuple[float, int]:
    """(seconds, bytes beyond the model) of one text read under a patch; bytes are 0 on a CPU."""
    on_gpu = tokens.device.type == "cuda"
    # Self-Extend's groups bring the farthest key within the trained length.
    options = {"group": max(2, -(-2 * tokens.shape[1] // TRAINED))} if method == "self_extend" else {}
    seconds, most = [], 0
    with patch_model(model, method, **options):
        for _ in range(3):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if on_gpu else 0
            started = time.perf_counter()
            model(tokens, use_cache=True, logits_to_keep=1)
            if on_gpu:
                torch.cuda.synchronize()
                most = torch.cuda.max_memory_allocated() - held
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), most


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.prefill", description=summary)
    parser.add_argument("--shapes", default="7b,smollm2", help=f"of {', '.join(SHAPES)}, with commas between")
    parser.add_argument("--lengths", default="32Ki,64Ki,128Ki", help="tokens of the prompts, with commas between")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(arguments)
    device, shapes = resolve_device(options.device), options.shapes.split(",")
    check_names("--shapes", shapes, SHAPES)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        model = random_model(shape, device)
        for length in map(parse_count, options.lengths.split(",")):
            tokens = torch.randint(8, SHAPES[shape]["vocab_size"], (1, length), device=device)
            for method in METHODS:
                seconds, most = prefill(model, method, tokens)
                rows.append({"shape": shape, "tokens": length, "method": method, "seconds": seconds, "bytes": most})
        del model
    echo(headline(machine(device)))
    table, plain = [["shape", "tokens", "method", "seconds", "of plain speed", "GiB"]], 1.0
    for row in rows:
        plain = row["seconds"] if row["method"] == METHODS[0] else plain
        share = f"{plain / row['seconds']:.2f}"
        size = f"{row['bytes'] / 2**30:.2f}"
        table.append([row["shape"], f"{row['tokens']:,}", row["method"], f"{row['seconds']:.3f}", share, size])
    print_columns(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1))


if __name__ == "__main__":
    run_script(main)
