"""The texts of a run: tokens to train on, the arguments of a forward pass, and evaluation on held-out windows."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehead.console import Progress
from rehead.data.beginning import NO_START, begun, text_start, uncounted
from rehead.data.order import rows_of_step
from rehead.data.repeats import with_repeats
from rehead.data.sources import identity
from rehead.data.store import IGNORED, Rows, TokenStore, write_store
from rehead.data.tokens import load_tokenizer, require_known, token_stream
from rehead.errors import UsageError
from rehead.models.live import evaluating
from rehead.recipes.training.models import Opened
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes

_CPU_TOKENS = 4096  # of a forward pass: more would leave the caches


def tokenizer_of(opened: Opened, option: str, otherwise: Any = None) -> Any:
    """A checkpoint's tokenizer.

    Args:
        opened: the checkpoint.
        option: the flag that needs it, for messages.
        otherwise: what to give where the checkpoint has none.

    Raises:
        UsageError: it has none that can be loaded.
    """
    files = opened.source.list_files()
    if otherwise is not None and not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
        return otherwise
    return load_tokenizer(opened.source, option)


def open_tokens(
    folder: Path, student: Opened, tokenizer: Any, options: UptrainOptions, run: Processes, progress: Progress | None
) -> TokenStore:
    """The tokens to train on: written by the main process where they are not there yet, mapped by all.

    Args:
        folder: of the store.
        student: for the size of its vocabulary.
        tokenizer: the student's.
        options: of the run.
        run: the processes.
        progress: called with ("tokenising", tokens, tokens wanted or 0).

    Raises:
        UsageError: data that is missing, empty, not text, or shorter than a row.
    """
    limit = options.steps * options.rows_per_step * options.seq_length + 1 if options.streaming else None
    if run.main:
        parts = [identity(options.data), _tokenizer_hash(tokenizer), limit]
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        write_store(
            folder,
            options.data,
            tokenizer,
            _vocab_size(student),
            key=key,
            limit=limit,
            streaming=options.streaming,
            progress=progress,
            cache=None if options.token_cache is None else Path(options.token_cache),
        )
    run.wait()
    store = TokenStore(folder, text_start(tokenizer))
    if store.rows(options.seq_length) < 1:
        raise UsageError(
            f"--data {', '.join(options.data)}: too short, {store.facts.tokens} tokens where a row has "
            f"{options.seq_length} and one to predict; give more text or a smaller --seq-length"
        )
    return store


def rows_to_train(store: TokenStore, options: UptrainOptions, step: int, seed: int, part: slice = slice(None)) -> Rows:
    """The rows of an optimiser step, over all processes; the same whenever and wherever they are read.

    Args:
        store: the tokens.
        options: of the run.
        step: 0 for the first.
        seed: of the order and of what repeats.
        part: which of the rows to read.
    """
    count, length = options.rows_per_step, options.seq_length
    index = rows_of_step(step, count, store.rows(length), seed)[part]
    rows = store.read(index, length, isolated=options.packing == "isolated")
    places = np.arange(step * count, (step + 1) * count)[part]
    return with_repeats(rows, places, options.repeats, seed, len(store.start))


def first_micro_batch(options: UptrainOptions, run: Processes) -> int:
    """Rows in a forward pass, as asked for or to begin with: a GPU is given all of its share of a step."""
    share = options.rows_per_step // run.world
    by_default = share if run.device.type == "cuda" else max(_CPU_TOKENS // options.seq_length, 1)
    return min(options.micro_batch or by_default, share)


def forward_inputs(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Arguments of :class:`~rehead.recipes.training.losses.StudentWithLoss`, on the device.

    What is the default is left out, which spares the model looking at it: positions where every row is one document.
    Where labels count is found here, on the host; finding it on a GPU would wait for all that is queued there.
    """
    inputs = {"input_ids": rows.input_ids, "labels": rows.labels}
    if bool((rows.position_ids[:, 1:] <= rows.position_ids[:, :-1]).any()):
        inputs["position_ids"] = rows.position_ids
    inputs["counted_index"] = (rows.labels.flatten() != IGNORED).nonzero().squeeze(-1)
    if device.type == "cuda":
        inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


@dataclass(frozen=True)
class HeldOut:
    """A held-out text.

    Attributes:
        name: as the user wrote it.
        windows: int64 [n, window], disjoint; in each, all but the first token are predicted.
        start: int64 [p], how the tokenizer begins a text; these tokens are never predicted.
    """

    name: str
    windows: Tensor
    start: Tensor = NO_START


def held_out_windows(name: str, student: Opened, tokenizer: Any, options: UptrainOptions) -> HeldOut:
    """Disjoint windows of a held-out text, each begun as the tokenizer begins a text.

    Raises:
        UsageError: the text is missing, empty, not text, or shorter than a window; a token is outside the vocabulary.
    """
    tokens = token_stream([name], tokenizer, options.eval_tokens, option="--eval-data")
    require_known(int(tokens.max()), _vocab_size(student), "--eval-data")
    windows = tokens[: len(tokens) // options.seq_length * options.seq_length].view(-1, options.seq_length)
    if not len(windows):
        more = "more text" if len(tokens) < options.eval_tokens else "a larger --eval-tokens"
        raise UsageError(
            f"--eval-data {name}: too short, {len(tokens)} tokens where a window has {options.seq_length}; give {more}"
        )
    start = text_start(tokenizer)
    return HeldOut(name, begun(windows, start), start)


def evaluate_held_out(module: Any, text: HeldOut, run: Processes, rows: int) -> dict[str, Any]:
    """Figures of one text, over disjoint windows: what ``rehead evaluate`` calls the disjoint convention.

    Args:
        module: the student with its loss (:class:`rehead.recipes.training.losses.StudentWithLoss`).
        text: the text.
        run: the processes; each takes its share of the windows.
        rows: windows in a forward pass.

    Returns:
        ``tokens_counted``, ``perplexity``, and with a teacher ``kl`` (nats per token) and ``top1_agreement``.
    """
    sums: dict[str, float] = {}
    counted = 0
    with evaluating(module):
        # Sharded parameters are gathered by all processes together, so all run as many passes; spare ones count
        # nothing.
        size = max(min(rows, -(-len(text.windows) // run.world)), 1)
        for at in range(0, len(text.windows), size * run.world):
            mine = text.windows[at + run.rank * size : at + (run.rank + 1) * size]
            spare = not len(mine)
            mine = text.windows[:1] if spare else mine
            labels = torch.full_like(mine, IGNORED)
            labels[:, :-1] = uncounted(mine[:, 1:], text.start)
            index = (labels.flatten() != IGNORED).nonzero().squeeze(-1)
            found = module(mine.to(run.device), labels=labels.to(run.device), counted_index=index.to(run.device))
            counted += 0 if spare else len(index)
            for name, value in found.metrics.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if spare else float(value))
    names = sorted(sums)  # the same in every process, as each has made as many passes
    total = run.sum(torch.tensor([counted, *(sums.get(name, 0.0) for name in names)], device=run.device))
    count, *means = total.double().tolist()
    figures = {name: mean / count for name, mean in zip(names, means)}
    facts: dict[str, Any] = {"tokens_counted": int(count)}
    if module.teacher is not None:
        facts |= {"kl": figures["kl"], "top1_agreement": figures["top1_agreement"]}
    return facts | {"perplexity": math.exp(min(figures["cross_entropy"], 700.0))}


def _vocab_size(student: Opened) -> int:
    return int(student.config.get_text_config(decoder=True).vocab_size)


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{tokenizer.eos_token_id} {text}".encode()).hexdigest()
