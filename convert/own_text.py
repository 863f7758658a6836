"""Text that a model writes itself, to calibrate on beside a text that somebody chose.

A fit of some hundred thousand tokens learns the subjects that they are about. A model's own samples are of all the
subjects that it knows, in its own languages, and there are as many of them as one wants (Liu et al. 2023, LLM-QAT,
arXiv 2305.17888). Every sequence starts with a word drawn at random and goes on as the model predicts, at
temperature 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.console import Progress
from rehead.convert.whole_model import load_whole
from rehead.data.beginning import text_start
from rehead.data.calibration import CalibrationText, shares
from rehead.errors import UsageError
from rehead.models.device_memory import free_memory
from rehead.models.model import Model
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.models.recording import record
from rehead.models.watch import PLAIN, register_plain

NAME = "written by the model"
#: Sequences at once at most, and the part of the device's free memory that their keys and values may take.
_ROWS, _CACHE_SHARE = 1024, 4


@torch.no_grad()
def with_own_text(
    text: CalibrationText,
    model: Model,
    tokens: int,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationText:
    """The text and so many tokens of the model's own, in sequences of the same lengths.

    Raises:
        UnsupportedError: the model cannot be loaded whole.
        UsageError: it has no tokenizer, so nobody knows what its texts begin with.
    """
    counts = shares(tokens, text.lengths)
    if not counts:
        return text
    beginnings = _beginnings(model)
    live = load_whole(
        model, device, "let it write", "drop --own-text", torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    register_plain()
    live.set_attn_implementation(PLAIN)
    parts: list[Tensor] = []
    for part in text.tokens:
        length = part.shape[1]
        count = counts.get(length, 0)
        if progress is not None:
            progress("writing text", len(parts), len(text.tokens))
        own = [written(live, beginnings(count, seed + length), length, seed)] if count else []
        parts.append(torch.cat([part, *own]))
    del live
    if device.type == "cuda":
        torch.cuda.empty_cache()  # so that what is free counts as free
    return replace(text, tokens=parts, names=[*text.names, NAME])


def written(live: Any, beginnings: Tensor, length: int, seed: int = 0) -> Tensor:
    """Sequences that a model writes, int64 [N, length] on the CPU.

    Args:
        live: the model, with an attention that reads a static cache.
        beginnings: int64 [N, p], tokens to go on from.
        length: tokens of each sequence.
        seed: of what is drawn.
    """
    config, device = live.config.get_text_config(decoder=True), live.device
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * heads * size * config.num_hidden_layers * length
    rows = _ROWS
    if device.type == "cuda":
        rows = max(1, min(rows, free_memory(device) // (_CACHE_SHARE * 2 * numbers)))
    parts: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        parts = [_go_on(live, part.to(device), length).cpu() for part in beginnings.split(rows)]
    return torch.cat(parts)


def _go_on(live: Any, beginnings: Tensor, length: int) -> Tensor:
    from transformers import StaticCache

    count, given = beginnings.shape
    device = beginnings.device
    tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
    tokens[:, :given] = beginnings
    places, at = torch.arange(length, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    cache = StaticCache(config=live.config, max_cache_len=length)

    def step() -> None:
        """Feed the token at ``at`` and draw the next, where it is not given."""
        ids, visible = tokens.index_select(1, at), (places <= at).expand(count, 1, 1, -1)
        out = live(
            input_ids=ids,
            attention_mask=visible,  # whole, since transformers' own making of masks cannot be recorded
            position_ids=at.expand(count, 1),
            use_cache=True,
            **cache_argument(cache),
        )
        chances = out.logits[:, -1].float().softmax(-1)
        # The largest of p / e with exponential e is a draw from p.
        drawn = (chances / torch.empty_like(chances).exponential_().clamp_min_(1e-20)).argmax(-1, keepdim=True)
        at.add_(1)
        tokens.index_copy_(1, at, torch.where(at < given, tokens.index_select(1, at), drawn))

    left, advance = length - 1, step
    if device.type == "cuda" and left > 8:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # what is chosen or compiled at the first steps cannot be recorded
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        left -= 3
        recording = record(step, stream)
        if recording is not None:  # else a class that waits for the GPU: it writes as well, more slowly
            advance = recording[0].replay
    for _ in range(left):
        advance()
    return tokens


def _beginnings(model: Model) -> Any:
    """(count, seed) -> what so many texts begin with: the tokenizer's own start, then a word drawn at random."""
    try:
        tokenizer = open_tokenizer(model.source)
        words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        start = text_start(tokenizer)
    except Exception:  # whatever a tokenizer of somebody's raises
        words, start = [], torch.empty(0, dtype=torch.int64)
    words = [word for word in words if word < int(model.config.vocab_size)]
    if not words:
        raise UsageError(f"{model.source.id}: has no tokenizer that gives it words to begin with; drop --own-text")

    def begin(count: int, seed: int) -> Tensor:
        drawn = torch.randint(0, len(words), (count,), generator=torch.Generator().manual_seed(seed))
        return torch.cat([start.expand(count, -1), torch.tensor(words)[drawn][:, None]], 1)

    return begin
