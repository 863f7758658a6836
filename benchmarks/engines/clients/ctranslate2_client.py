"""CTranslate2: its converter and its generator, float32. It reports no cache size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from protocol import serve


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    converted = str(Path(job["work"]) / "ctranslate2")
    TransformersConverter(job["model"]).convert(converted, force=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    answer = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(job["prompt"])], max_length=job["new_tokens"], min_length=job["new_tokens"],
        sampling_topk=1, include_prompt_in_result=False, return_logits_vocab=True,
    )[0]  # fmt: skip
    tokens = [int(token) for token in answer.sequences_ids[0]]
    logprobs = []
    for token, row in zip(tokens, answer.logits[0], strict=False):
        scores = torch.as_tensor(list(row) if not hasattr(row, "__array__") else row.__array__()).float().flatten()
        logprobs.append(float(scores.log_softmax(-1)[token]))
    return {"tokens": tokens, "logprobs": logprobs, "cache_bytes_per_token": None, "notes": []}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(ctranslate2.__version__, handle)
