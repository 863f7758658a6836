"""CTranslate2: its converter and its generator, float32. It reports no cache size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
import numpy
import torch
from ctranslate2.converters import TransformersConverter
from protocol import serve
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  (loaded once, before jobs are forked)


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    converted = Path(job["work"]) / "ctranslate2"
    try:
        TransformersConverter(job["model"]).convert(str(converted), force=True)
    except ValueError as error:
        if "No conversion is registered" in str(error):
            raise ValueError("its converter has no class for this architecture") from None
        raise
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    _fill_special_tokens(converted / "config.json", tokenizer.eos_token)
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32", intra_threads=1)
    answer = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(job["prompt"])], max_length=job["new_tokens"], min_length=job["new_tokens"],
        sampling_topk=1, include_prompt_in_result=False, return_logits_vocab=True,
    )[0]  # fmt: skip
    tokens = [int(token) for token in answer.sequences_ids[0]]
    rows = [torch.from_numpy(numpy.array(row)).float().flatten().log_softmax(-1) for row in answer.logits[0]]
    logprobs = [float(row[token]) for token, row in zip(tokens, rows, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "cache_bytes_per_token": None, "notes": []}


def _fill_special_tokens(config: Path, end: str) -> None:
    """Its converter writes null for special tokens that a tokenizer lacks, and its engine refuses that."""
    values = json.loads(config.read_text())
    missing = [key for key, value in values.items() if key.endswith("_token") and value is None]
    config.write_text(json.dumps({**values, **dict.fromkeys(missing, end)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(ctranslate2.__version__, handle)
