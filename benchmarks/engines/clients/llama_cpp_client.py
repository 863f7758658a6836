"""llama.cpp: its converter writes a GGUF file in float32, xllamacpp serves it with a float32 cache; ids in and out."""

from __future__ import annotations

import os
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SOURCES = Path(sys.prefix) / "llama.cpp"
sys.path[:0] = [str(SOURCES), str(SOURCES / "gguf-py")]

import gguf  # noqa: F401  (the converter's own; imported before the first job is forked)
import torch
import transformers
import xllamacpp
from conversion.base import TextModel
from protocol import serve

CELLS = 4096
VOCABULARY = "vocabulary written as plain byte-pair tokens: the converter does not know this tokenizer"


def convert(model: str, gguf_file: str, plain_vocabulary: bool) -> list[str]:
    """Run the converter on a folder.

    Args:
        plain_vocabulary: write the tokenizer as GPT-2's kind. Token ids go in and out, so the tokenizer plays no part.
    """
    if plain_vocabulary:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        for kind in _all_subclasses(TextModel):
            kind.set_vocab = TextModel._set_vocab_gpt2
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", gguf_file, "--outtype", "f32"]
    runpy.run_path(str(SOURCES / "convert_hf_to_gguf.py"), run_name="__main__")
    return [VOCABULARY] if plain_vocabulary else []


def _all_subclasses(kind: type) -> list[type]:
    below = list(kind.__subclasses__())
    return below + [deeper for child in below for deeper in _all_subclasses(child)]


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    gguf_file = str(Path(job["work"]) / "model.gguf")
    notes = convert(job["model"], gguf_file, job["options"].get("plain_vocabulary", True))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf_file
    parameters.n_ctx = CELLS
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.cpuparams.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = 4
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions(
        {
            "prompt": job["prompt"], "max_tokens": job["new_tokens"], "temperature": 0, "ignore_eos": True,
            "logprobs": 1, "return_tokens": True, "cache_prompt": False, "samplers": ["temperature"],
        }
    )  # fmt: skip
    if "error" in answer:
        raise RuntimeError(str(answer["error"]))
    steps = answer["choices"][0]["logprobs"]["content"]
    os.unlink(gguf_file)
    return {
        "tokens": [step["id"] for step in steps],
        "logprobs": [step["logprob"] for step in steps],
        "cache_bytes_per_token": _cache_bytes(Path(job["log"]).read_text(errors="replace")),
        "notes": notes,
    }


def _cache_bytes(log: str) -> float | None:
    """Bytes per token as the engine logs its allocation: sizes in MiB of so many cells."""
    sizes = re.findall(r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells", log)
    return sum(float(size) * 2**20 / int(cells) for size, cells in sizes) if sizes else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(f"{version('xllamacpp')} (transformers {transformers.__version__} in the converter)", handle)
