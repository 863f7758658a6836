"""What one calibration pass for several numbers of KV heads costs beside passes for one each.

``python -m rehead.benchmarks.one_pass`` times, on a random LLaMA of two layers with 16 heads, the pass that gathers
the moments of 8 groups (of which those of 4, 2 and 1 are sums) beside a pass for each number alone. CPU seconds of
turns taken by all, so that a load of the machine falls on each; medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rehead.benchmarks.machine import headline, machine
from rehead.console import quiet_transformers
from rehead.convert import plan
from rehead.convert.calibrated import calibration_text
from rehead.healing.run import observe
from rehead.variants.pool.regroup import POOL_MOMENTS

COUNTS = (8, 4, 2, 1)


@click.command()
@click.option("--hidden", default=512, show_default=True, help="Width of the model.")
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens, in sequences of 512.")
@click.option("--repeats", default=3, show_default=True, help="Turns of which medians are taken.")
def command(hidden: int, tokens: int, repeats: int) -> None:
    """One pass for 8, 4, 2 and 1 KV heads beside a pass for each."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=16,
                         vocab_size=1024, max_position_embeddings=512)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        asked = plan(Path(folder), num_key_value_heads=1, method="svd", calibration=["random"],
                     calibration_tokens=tokens, calibration_length=512)  # fmt: skip
        text, seconds = calibration_text(asked), {count: [] for count in COUNTS}  # type: ignore[var-annotated]
        for _ in range(repeats):
            for count in COUNTS:
                start = time.process_time()
                for _ in observe(asked.model, text, POOL_MOMENTS, count, torch.device("cpu")):
                    pass
                seconds[count].append(time.process_time() - start)
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    print(headline(machine("cpu")))
    for count, times in seconds.items():
        print(f"{count} groups: {medians[count]:.2f} s of CPU ({min(times):.2f} to {max(times):.2f})")
    print(f"one pass for all is {medians[8] / medians[1]:.2f} times a pass for 1, and "
          f"{sum(medians.values()) / medians[8]:.2f} times cheaper than four passes")  # fmt: skip


if __name__ == "__main__":
    command()
