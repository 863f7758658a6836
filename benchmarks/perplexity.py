"""Claim: each convention's perplexity is its referee's, and a model is at no distance from itself.

One text, one model, in one run: Rehead's ``disjoint`` beside the ten-line loop that everybody writes, ``strided``
beside the loop of transformers' guide, ``rolling`` beside lm-evaluation-harness's own code; and the divergence of the
model from a second copy of itself. The loops here are the plainest there are, on purpose.

    rehead bench perplexity --model HuggingFaceTB/SmolLM2-135M --data speeches.txt
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.benchmarks.machine import headline, machine
from rehead.data.tokens import token_stream
from rehead.errors import UnsupportedError
from rehead.models.live import resolve_device
from rehead.recipes.evaluation.divergence import compare
from rehead.recipes.evaluation.models import load_model
from rehead.recipes.evaluation.perplexity import prefix_token, window_losses


@dataclass(frozen=True)
class Row:
    """One convention: Rehead's perplexity, its referee's, and their relative difference."""

    convention: str
    referee: str
    ours: float
    theirs: float

    @property
    def difference(self) -> float:
        return abs(self.ours / self.theirs - 1)


@torch.no_grad()
def plain_loop(model: Any, tokens: Tensor, window: int) -> float:
    """Mean loss over disjoint windows, as ``model(input_ids, labels)`` gives it; tokens int64 [T]."""
    total = 0.0
    rows = tokens[: len(tokens) // window * window].view(-1, window).to(model.device)
    for row in rows:
        total += float(model(input_ids=row[None], labels=row[None]).loss)
    return math.exp(total / len(rows))


@torch.no_grad()
def guide_loop(model: Any, tokens: Tensor, window: int, stride: int) -> float:
    """The overlapping windows of transformers' guide to perplexity, every counted token weighing the same."""
    total, count, before = 0.0, 0, 0
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        row = tokens[None, start:end].to(model.device)
        labels = row.clone()
        labels[:, : before - start] = -100
        counted = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=row, labels=labels).loss) * counted
        count, before = count + counted, end
        if end == len(tokens):
            break
    return math.exp(total / count)


def harness(model: Any, tokenizer: Any, text: str, window: int) -> tuple[float, Tensor]:
    """The harness's ``loglikelihood_rolling`` as a perplexity, and the tokens that it read.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError:
        raise UnsupportedError('lm-evaluation-harness is not installed; run pip install "rehead[tasks]"') from None
    from rehead.recipes.evaluation.tasks import quiet_harness

    with quiet_harness():
        referee = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=1)
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        found = referee.loglikelihood_rolling([request], disable_tqdm=True)[0]
        tokens = torch.tensor(referee.tok_encode(text))
    return math.exp(-found / len(tokens)), tokens


def run(loaded: Any, again: Any, tokens: Tensor, window: int, stride: int) -> tuple[list[Row], float]:
    """All three conventions beside their referees, and the largest divergence of a token from a second copy.

    Args:
        loaded: the model, as :func:`rehead.recipes.evaluation.models.load_model` gives it; ``again``: a second copy.
        tokens: int64 [T].
        window, stride: of the conventions.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rolled, read = harness(model, tokenizer, text, window)
    ours = {
        "disjoint": window_losses(model, tokens, "disjoint", window),
        "strided": window_losses(model, tokens, "strided", window, stride),
        "rolling": window_losses(model, read, "rolling", window, prefix=prefix_token(tokenizer)),
    }
    theirs = {
        "disjoint": ("plain transformers loop", plain_loop(model, tokens, window)),
        "strided": ("transformers guide's loop", guide_loop(model, tokens, window, stride)),
        "rolling": ("lm-evaluation-harness", rolled),
    }
    rows = [Row(name, theirs[name][0], found.value, theirs[name][1]) for name, found in ours.items()]
    itself = compare(model, {"model": again.model}, tokens, window)["model"]
    return rows, float(itself.tokens.kl.max())


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``rehead bench perplexity``."""
    parser = argparse.ArgumentParser(prog="rehead bench perplexity", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a folder or Hub id")
    parser.add_argument("--data", required=True, help="a text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    loaded, again = (load_model("model", args.model, device=device, dtype=args.dtype) for _ in range(2))
    tokens = token_stream([args.data], loaded.tokenizer, args.tokens)
    rows, itself = run(loaded, again, tokens, args.window, args.stride)
    if args.json:
        facts = [{**asdict(row), "difference": row.difference} for row in rows]
        print(json.dumps({"rows": facts, "kl_to_itself_max": itself, "tokens": len(tokens)}, indent=2))
        return
    print(f"{args.model}, {len(tokens)} tokens of {args.data}, window {args.window}, stride {args.stride}, "
          f"{args.dtype}")  # fmt: skip
    print(headline(machine(device)))
    print(f"{'convention':<12}{'Rehead':>12}{'referee':>12}{'difference':>12}  of")
    for row in rows:
        print(f"{row.convention:<12}{row.ours:>12.5f}{row.theirs:>12.5f}{row.difference:>12.1e}  {row.referee}")
    print(f"KL of the model to a second copy of itself: at most {itself:g} nats per token")


if __name__ == "__main__":
    main()
