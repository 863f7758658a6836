"""Short continuations of a text, word for word: what a figure such as KL means to a reader.

Every model continues the same pieces of held-out text greedily, so the result is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rehead.data.beginning import NO_START, begun
from rehead.models.live import evaluating
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.positions import position_limit
from rehead.models.predictions import keeps_logits
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.needle import begins_word

#: Tokens of text that a continuation follows.
PROMPT = 40
#: How far a prompt may be moved so that it begins with a sentence and ends with a word.
_REACH = 256


def samples(
    models: Mapping[schema.Who, Any],
    tokens: Tensor,
    tokenizer: Any,
    count: int,
    length: int,
    name: str,
    *,
    start: Tensor = NO_START,
    progress: Callable[[float, float], None] | None = None,
) -> list[schema.Sample]:
    """Let models continue pieces of a text.

    Args:
        models: transformers causal language models.
        tokens: int64 [T], the text.
        tokenizer: to show tokens as text, and for the token that ends one.
        count: pieces, evenly spread over the text.
        length: tokens of each continuation.
        name: of the text.
        start: int64 [p], how the tokenizer begins a text (:func:`rehead.data.beginning.text_start`).
        progress: called with (models done, models).

    Returns:
        Fewer than ``count`` for a text or a model that is too short.
    """
    limits = [limit for model in models.values() if (limit := position_limit(model)) is not None]
    prompt = min([PROMPT, *(limit - length for limit in limits)])
    places = _places(tokens, tokenizer, count, prompt, length) if prompt > len(start) else []
    if not places:
        return []
    rows = begun(torch.stack([tokens[at : at + prompt] for at in places]), start)
    continued: dict[schema.Who, list[list[int]]] = {}
    for done, (who, model) in enumerate(models.items()):
        continued[who] = [
            _ended(row, tokenizer.eos_token_id) for row in continue_greedily(model, rows, length).tolist()
        ]
        if progress is not None:
            progress(done + 1, len(models))

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    found = []
    for row, at in enumerate(places):
        first = continued["baseline"][row] if "baseline" in continued else None
        found.append(
            schema.Sample(
                data=name,
                position=at,
                prompt=text(rows[row].tolist()),
                truth=text(tokens[at + prompt : at + prompt + length].tolist()),
                continuations=[
                    schema.Continuation(
                        who=who,
                        text=text(ids[row]),
                        tokens=len(ids[row]),
                        same=None if first is None or who == "baseline" else _shared(ids[row], first),
                        same_text="" if first is None else text(ids[row][: _shared(ids[row], first)]),
                    )
                    for who, ids in continued.items()
                ],
            )
        )
    return found


def continue_greedily(model: Any, rows: Tensor, length: int) -> Tensor:
    """The most likely next tokens, one after the other, int64 [b, length]; through the model's cache if it has one.

    Args:
        model: a transformers causal language model.
        rows: int64 [b, n], prompts.
        length: tokens to add to each.
    """
    device = next(model.parameters()).device
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    read, whole, cache = rows.to(device), rows.to(device), None
    with evaluating(model):
        for _ in range(length):
            out = model(input_ids=read, use_cache=True, **cache_argument(cache), **keep)
            cache = returned_cache(out)
            latest = out.logits[:, -1:].argmax(-1)
            whole = torch.cat([whole, latest], 1)
            read = whole if cache is None else latest
    return whole[:, rows.shape[1] :].cpu()


def _places(tokens: Tensor, tokenizer: Any, count: int, prompt: int, length: int) -> list[int]:
    """Where pieces begin, evenly spread: with a sentence, and so that the prompt ends with a word, where one is near.

    Args:
        prompt, length: tokens of the prompt and of its continuation.
    """
    last = len(tokens) - prompt - length
    if last < 0:
        return []
    found = []
    for number in range(count):
        at = number * (last + 1) // max(count, 1)
        ids = tokens[at : min(at + _REACH, last) + prompt + 1].tolist()
        texts = [text.rstrip(" ") for text in tokenizer.batch_decode([[token] for token in ids])]
        words = [begins_word(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
        starts = [i for i in range(1, len(ids) - prompt) if texts[i - 1].endswith((".", "!", "?", "\n"))]
        starts = ([0] if at == 0 else []) + starts
        whole = (i for i in starts if words[i + prompt] or texts[i + prompt - 1].endswith("\n"))
        found.append(at + next(whole, next(iter(starts), 0)))
    return sorted({min(at, last) for at in found})


def _ended(ids: list[int], eos: int | None) -> list[int]:
    """Tokens up to the one that ends a text."""
    return ids[: ids.index(eos)] if eos in ids else ids


def _shared(ids: list[int], other: list[int]) -> int:
    """Tokens at the beginning that two continuations share."""
    return next((i for i, pair in enumerate(zip(ids, other)) if pair[0] != pair[1]), min(len(ids), len(other)))
