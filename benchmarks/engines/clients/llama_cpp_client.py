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

import gguf
import torch
import transformers  # noqa: F401  (so that jobs need not import it)
import xllamacpp
from conversion.base import TextModel
from protocol import serve

CELLS = 4096


def convert(model: str, gguf_file: str, numbered: bool) -> None:
    """Run the converter on a folder.

    Args:
        numbered: write a vocabulary of numbers. The server leaves tokens out of its answer that are parts of
            characters, and its converter refuses tokenizers that it does not know.
    """
    if numbered:
        shipped = TextModel.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            type(self).set_vocab = _set_numbered_vocabulary
            shipped(self, *args, **kwargs)

        TextModel.__init__ = init
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", gguf_file, "--outtype", "f32"]
    try:
        runpy.run_path(str(SOURCES / "convert_hf_to_gguf.py"), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError("the converter has no class for this architecture") from None


def _set_numbered_vocabulary(self: Any) -> None:
    size = self.hparams["vocab_size"]
    writer = self.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    gguf_file = str(Path(job["work"]) / "model.gguf")
    convert(job["model"], gguf_file, job["options"].get("numbered", True))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf_file
    parameters.n_ctx = CELLS
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    # On the CPU it computes in half precision.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = 4
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        reasons = re.findall(r"error loading model: (.*)", _log(job))
        raise RuntimeError(reasons[-1] if reasons else error) from None
    answer = server.handle_completions(
        {
            "prompt": job["prompt"], "max_tokens": job["new_tokens"], "temperature": 0, "ignore_eos": True,
            "logprobs": 1, "return_tokens": True, "cache_prompt": False, "samplers": ["temperature"],
        }
    )  # fmt: skip
    if "error" in answer:
        raise RuntimeError(answer["error"]["message"])
    steps = answer["choices"][0]["logprobs"]["content"]
    if len(steps) != job["new_tokens"]:
        raise RuntimeError(f"{len(steps)} tokens in the answer, not {job['new_tokens']}")
    os.unlink(gguf_file)
    return {
        "tokens": [step["id"] for step in steps],
        "logprobs": [step["logprob"] for step in steps],
        "cache_bytes_per_token": _cache_bytes(_log(job)),
        "notes": [],
    }


def _log(job: dict[str, Any]) -> str:
    sys.stderr.flush()
    return Path(job["log"]).read_text(errors="replace")


def _cache_bytes(log: str) -> float | None:
    """Bytes per token as the engine logs its allocation: sizes in MiB of so many cells."""
    sizes = re.findall(r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells", log)
    return sum(float(size) * 2**20 / int(cells) for size, cells in sizes) if sizes else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(f"xllamacpp {version('xllamacpp')}", handle)
