"""Retrieval by length and depth: can the model still look up what stood far behind?

Base models cannot be asked questions, so the test is the form that they all learn: a key and a value, words drawn at
random, stand on a line of their own somewhere in running text; at its end the key is repeated, and the value follows::

    ... running text
     lantern Quebec marble violin harbour seven
    running text ...
     lantern Quebec marble violin -> harbour seven

It takes the induction heads that copying, quoting and retrieval are made of (Olsson et al. 2022, arXiv 2209.11895), and
those are what sharing KV heads may cost. A trial is a hit when greedy decoding gives the whole value. That is read off
one forward pass: greedy decoding gives it exactly when each of its tokens is the most likely one after those before it.
Words are single tokens of the text at hand that do not occur in the passage used, so there is no other match to find,
and guessing hits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehead.data.beginning import text_start
from rehead.errors import UsageError
from rehead.models.live import evaluating
from rehead.models.positions import readable
from rehead.models.predictions import batch_size
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.windows import predict_last

KEY, VALUE = 4, 2


def needle_cells(
    models: Mapping[schema.Who, Any],
    tokens: Tensor,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 8,
    seed: int = 0,
    *,
    beyond: bool = False,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[schema.NeedleCell], list[str]]:
    """Try every length and depth; each model gets the same prompts.

    Args:
        models: transformers causal language models that share a vocabulary.
        tokens: int64 [T], running text.
        tokenizer: to tell words from other tokens and for BOS; None takes any token of the text as a word.
        lengths: tokens of context, the repeated key included.
        depths: where the needle stands, 0 the beginning and 1 right before the repeated key.
        trials: prompts in a cell.
        seed: of words and passages.
        beyond: try lengths too that the models were not trained for.
        progress: called with (cells done, cells).

    Returns:
        (cells, notes on lengths that were left out and why).

    Raises:
        UsageError: the text has too few words or is shorter than the longest context.
    """
    require_length(tokens, lengths)
    words = word_tokens(tokens, tokenizer)
    cells: list[schema.NeedleCell] = []
    notes: list[str] = []
    done = 0
    for length in lengths:
        fitting = {}
        for who, model in models.items():
            limit = readable(model, beyond)
            if limit is not None and length + VALUE > limit:
                notes.append(f"needle at {length} tokens left out for the {who}: it has positions for {limit}")
            else:
                fitting[who] = model
        for depth in depths:
            rows = torch.stack(
                [prompt(tokens, words, tokenizer, length, depth, (seed, length, round(1000 * depth), trial))
                 for trial in range(trials)]
            )  # fmt: skip
            for who, model in fitting.items():
                hits = count_hits(model, rows)
                cells.append(schema.NeedleCell(who=who, length=length, depth=depth, hits=hits, trials=trials))
            done += 1
            if progress is not None:
                progress(done, len(lengths) * len(depths))
    return cells, notes


def require_length(tokens: Tensor, lengths: Sequence[int]) -> None:
    """Raise UsageError where a text is shorter than the longest context."""
    length = max(lengths, default=0)
    if len(tokens) < length:
        raise UsageError(
            f"--needle {length}: the text has only {len(tokens)} tokens; give more text, more --tokens or a smaller "
            "length"
        )


def prompt(tokens: Tensor, words: Tensor, tokenizer: Any, length: int, depth: float, seed: Sequence[int]) -> Tensor:
    """One prompt with the value that should follow, int64 [length + VALUE].

    Args:
        tokens: int64 [T], running text, of which a passage is taken.
        words: int64 [W], tokens that may be drawn.
        tokenizer: for BOS, where it begins texts with one.
        length: tokens up to and with the repeated key.
        depth: 0 to 1.
        seed: of what is drawn.
    """
    draw = np.random.default_rng(list(seed))
    first, line = text_start(tokenizer), _line_end(tokenizer)
    room = length - 2 * KEY - VALUE - len(first) - 3 * len(line)
    start = int(draw.integers(0, len(tokens) - room + 1))
    passage = tokens[start : start + room]
    fresh = words[~torch.isin(words, passage)]
    pool = fresh if len(fresh) >= KEY + VALUE else words
    drawn = pool[torch.from_numpy(draw.choice(len(pool), KEY + VALUE, replace=False))]
    key, value = drawn[:KEY], drawn[KEY:]
    at = round(depth * room)
    return torch.cat([first, passage[:at], line, key, value, line, passage[at:], line, key, value])


def count_hits(model: Any, rows: Tensor) -> int:
    """How many prompts a model completes with their whole value, greedily.

    Args:
        rows: int64 [N, length + VALUE], as :func:`prompt` makes them.
    """
    hits = 0
    with evaluating(model):
        for part in rows.split(batch_size(model, rows.shape[1])):
            best = predict_last(model, part[:, :-1], VALUE).argmax().cpu()
            hits += int((best == part[:, -VALUE:]).all(-1).sum())
    return hits


def word_tokens(tokens: Tensor, tokenizer: Any, flag: str = "--needle") -> Tensor:
    """Tokens of a text that stand for a whole word of three letters or more, int64 [W], sorted.

    Args:
        tokens: int64 [T], the text.
        tokenizer: None takes any token as a word.
        flag: what asks for them, for messages.

    Raises:
        UsageError: there are too few to draw from.
    """
    found = torch.unique(tokens)
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        texts = tokenizer.batch_decode(found[:, None].tolist(), clean_up_tokenization_spaces=False)
        pieces = tokenizer.convert_ids_to_tokens(found.tolist())
        keep = [
            int(token) not in special and text.strip().isalpha() and len(text.strip()) >= 3 and begins_word(piece)
            for token, text, piece in zip(found, texts, pieces)
        ]
        chosen = found[torch.tensor(keep, dtype=torch.bool)]
        # A tokenizer of bytes or characters has no words; its own units will do.
        found = chosen if len(chosen) >= 4 * (KEY + VALUE) else found[~torch.isin(found, torch.tensor([*special, -1]))]
    if len(found) < KEY + VALUE:
        raise UsageError(f"{flag}: the text has {len(found)} different words, too few to hide one; give more text")
    return found


def begins_word(piece: str | None) -> bool:
    """Whether a token begins a word, by the marks that byte-pair and sentencepiece tokenizers put there."""
    return piece is not None and piece[:1] in ("Ġ", "▁", " ")


def _line_end(tokenizer: Any) -> Tensor:
    """The tokens of a line's end, int64 [0 or more]."""
    ids = tokenizer("\n", add_special_tokens=False).input_ids if tokenizer is not None else []
    return torch.tensor(ids, dtype=torch.int64)
