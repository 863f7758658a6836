"""The texts of a run as its student reads them: tokens to train on, and windows to evaluate on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rehead.data.beginning import begun, text_start
from rehead.data.sources import identity
from rehead.data.store import TokenStore, write_store
from rehead.data.tokens import load_tokenizer, require_known, token_stream
from rehead.errors import UsageError
from rehead.recipes.training.heldout import HeldOut
from rehead.recipes.training.loop import Progress
from rehead.recipes.training.models import Opened
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes


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


def _vocab_size(student: Opened) -> int:
    return int(student.config.get_text_config(decoder=True).vocab_size)


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{tokenizer.eos_token_id} {text}".encode()).hexdigest()
