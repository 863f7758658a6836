"""Does a checkpoint write the same text patched and unpatched? Greedy, a padded batch, dynamic and static cache.

python -m rehead.benchmarks.generation path/to/checkpoint --tokens 64
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehead.console import echo
from rehead.errors import UsageError, VerificationError
from rehead.patches import patch_model

PROMPTS = (
    "The history of the printing press begins",
    "My fellow citizens, when I look at the road that lies ahead of us and at the distance we have come,",
    "Once upon a time",
)
CACHES = ("dynamic", "static")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Comparison:
    """Texts of one cache.

    Attributes:
        cache: ``dynamic`` or ``static``.
        same: texts that agree to the last token.
        agreement: share of tokens before the first difference, over all texts.
        unpatched, patched: the texts.
    """

    cache: str
    same: int
    agreement: float
    unpatched: list[str]
    patched: list[str]


def compare(
    checkpoint: str, *, tokens: int = 64, dtype: str = "float32", device: str | None = None
) -> list[Comparison]:
    """Generate with and without the patch, and prove the patch on the prompts.

    Args:
        checkpoint: a local folder with model and tokenizer.
        tokens: new tokens for each prompt.
        dtype: a key of :data:`DTYPES`. In half precision two exact computations may round to different words.
        device: ``cpu`` or ``cuda``; the GPU where there is one, if None.

    Raises:
        UsageError: an unknown dtype.
        VerificationError: the patch cannot be proved on these prompts.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=DTYPES[dtype])
    model.to(device).eval()
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(device)
    length = inputs["input_ids"].shape[1]

    def generate(cache: str) -> torch.Tensor:
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        return out[:, length:].cpu()

    results = []
    for cache in CACHES:
        plain = generate(cache)
        with patch_model(model, "tiled") as patch:
            proof = patch.prove(input_ids=inputs["input_ids"], padding=False)
            print(f"... {cache}: {proof}", file=sys.stderr)
            patched = generate(cache)
        width = min(plain.shape[1], patched.shape[1])
        equal = (plain[:, :width] == patched[:, :width]).long().cumprod(-1)
        results.append(
            Comparison(
                cache,
                int(equal.all(-1).sum()) if plain.shape == patched.shape else 0,
                float(equal.double().mean()),
                tokenizer.batch_decode(plain, skip_special_tokens=True),
                tokenizer.batch_decode(patched, skip_special_tokens=True),
            )
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Compare and print; raises VerificationError where a text differs in float32."""
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.generation", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    results = compare(args.checkpoint, tokens=args.tokens, dtype=args.dtype, device=args.device)
    for result in results:
        print(f"{result.cache} cache: {result.same} of {len(PROMPTS)} texts the same, {result.agreement:.1%} of tokens")
    for text in results[0].patched:
        echo(f"  {' '.join(text.split())[:160]}")
    if args.dtype == "float32" and any(result.same < len(PROMPTS) for result in results):
        raise VerificationError("the patched model writes another text in float32; report the checkpoint's model type")


if __name__ == "__main__":
    main()
