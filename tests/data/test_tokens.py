"""Tokens, the store they are kept in, and rows that respect documents."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rehead.data import store as store_module
from rehead.data import tokens as tokens_module
from rehead.data.store import IGNORED, TokenStore, write_store
from rehead.data.tokens import load_tokenizer, token_pieces, token_stream
from rehead.errors import UsageError
from rehead.recipes.scratch import train_tokenizer

TEXTS = [f"Speech {i}: " + "the commerce of the union and the peace of nations. " * (1 + i % 7) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "speeches.txt"
    path.write_text("\n".join(TEXTS))
    return f"{path}#lines"


def test_documents_are_joined_with_eos(tokenizer, text: str) -> None:
    eos = tokenizer.eos_token_id
    wanted = [token for line in TEXTS for token in (*tokenizer(line).input_ids, eos)][:-1]
    stream = token_stream([text], tokenizer)
    assert stream.dtype == torch.int64
    assert stream.tolist() == wanted
    assert token_stream([text], tokenizer, 37).tolist() == wanted[:37]
    whole = text.removesuffix("#lines")
    assert token_stream([whole, whole], tokenizer).tolist().count(eos) == 1


def test_long_documents_are_cut_where_the_tokenizer_cuts(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    document = "\n".join(TEXTS)
    whole = tokenizer(document).input_ids
    monkeypatch.setattr(tokens_module, "PIECE", 500)
    pieces = list(token_pieces([document, "another"], tokenizer))
    assert len(pieces) > 10
    assert [begins for _, begins in pieces] == [True] + [False] * (len(pieces) - 2) + [True]
    assert np.concatenate([ids for ids, _ in pieces[:-1]]).tolist() == [*whole, tokenizer.eos_token_id]
    # Without a line's end, too.
    flat = document.replace("\n", " ")
    joined = np.concatenate([ids for ids, _ in token_pieces([flat], tokenizer)])
    assert joined.tolist()[:-1] == tokenizer(flat).input_ids


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "bytes", "whitespace"])
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    words=st.lists(
        st.sampled_from(["a", "the", "word", "\n", "\n\n", "  ", "née", "x y", "."]), min_size=30, max_size=60
    )
)
def test_a_cut_changes_no_token(kind: str, words: list[str]) -> None:
    """SentencePiece's way begins every text with a space; so does a piece of one that is read on its own."""
    document = "".join(word + " " * (len(word) % 2) for word in words) + "end"
    tokenizer = _spaced(kind)
    whole = tokenizer(document).input_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE", 40)
        patch.setattr(tokens_module, "_CONTEXT", 30)
        joined = np.concatenate([ids for ids, _ in token_pieces([document], tokenizer)]).tolist()
    assert joined == whole


@functools.cache
def _spaced(kind: str) -> Any:
    """A small tokenizer that handles the space before a word in one of the ways there are."""
    made = Tokenizer(models.BPE(unk_token="?"))
    if kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = ["the word a née x y . the word the word\n a word\n\n née  the  a"] * 4
    if kind == "prepend":  # words apart in training, and in use only by what was learned of them
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=["?"], show_progress=False))
    if kind == "prepend":
        made.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_too_little_text(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(tokenizer.decode([5]))
    with pytest.raises(UsageError, match="too short, 1 tokens"):
        token_stream([str(path)], tokenizer)


def _store(folder: Path, text: str, tokenizer, **options) -> TokenStore:
    return write_store(folder, [text], tokenizer, 280, key=options.pop("key", "a"), **options)


def test_rows_respect_documents(tokenizer, text: str, tmp_path: Path) -> None:
    store, length = _store(tmp_path / "store", text, tokenizer), 32
    stream = [token for line in TEXTS for token in (*tokenizer(line).input_ids, tokenizer.eos_token_id)]
    assert (store.facts.tokens, store.facts.documents, store.facts.dtype) == (len(stream), len(TEXTS), "uint16")
    count = store.rows(length)
    assert count == (len(stream) - 1) // length
    rows = store.read(np.arange(count), length)
    assert rows.input_ids.flatten().tolist() == stream[: count * length]
    starts = {0}
    for line in TEXTS:
        starts.add(max(starts) + len(tokenizer(line).input_ids) + 1)
    for at, (position, label) in enumerate(zip(rows.position_ids.flatten().tolist(), rows.labels.flatten().tolist())):
        begin = max([*(start for start in starts if start <= at), at // length * length])
        assert position == at - begin
        assert label == (IGNORED if at + 1 in starts else stream[at + 1])
    joined = store.read(np.array([1, 0]), length, isolated=False)
    assert joined.position_ids.tolist() == [list(range(length))] * 2
    assert joined.labels[1].tolist() == stream[1 : length + 1]


def test_a_store_is_written_once(tokenizer, text: str, tmp_path: Path) -> None:
    first = _store(tmp_path / "store", text, tokenizer).facts
    written = (tmp_path / "store" / "tokens.raw").stat().st_mtime_ns
    assert _store(tmp_path / "store", text, tokenizer).facts == first
    assert (tmp_path / "store" / "tokens.raw").stat().st_mtime_ns == written
    assert _store(tmp_path / "store", text, tokenizer, key="b").facts.sha256 == first.sha256
    short = _store(tmp_path / "store", text, tokenizer, key="c", limit=200).facts
    assert 200 <= short.tokens < first.tokens
    assert short.sha256 != first.sha256
    # One that a kill cut short is not taken for whole.
    with open(tmp_path / "store" / "tokens.raw", "r+b") as file:
        file.truncate(10)
    assert _store(tmp_path / "store", text, tokenizer, key="c", limit=200).facts == short


def test_a_limit_takes_sources_in_turn(tokenizer, tmp_path: Path) -> None:
    names = []
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text("\n".join(f"{letter} {i} peace" for i in range(50)))
        names.append(f"{tmp_path / letter}.txt#lines")
    store = write_store(tmp_path / "store", names, tokenizer, 280, key="k", limit=80)
    told = tokenizer.decode(store.read(np.array([0]), 60).input_ids[0]).split("<|endoftext|>")
    assert all(one[:1] != other[:1] for one, other in pairwise(told[:6]))


def test_a_tokenizer_that_is_too_large(tokenizer, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has 100"):
        write_store(tmp_path / "store", [text], tokenizer, 100, key="k")


def test_a_cache_is_filled_once_and_never_written_over(tmp_path: Path, tokenizer, monkeypatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("Peace and commerce with all nations. " * 40)
    cache, calls = tmp_path / "cache", []
    made = store_module.token_pieces
    monkeypatch.setattr(store_module, "token_pieces", lambda *a: calls.append(1) or made(*a))
    first = write_store(tmp_path / "one", [str(text)], tokenizer, 280, key="a" * 64, cache=cache)
    again = write_store(tmp_path / "two", [str(text)], tokenizer, 280, key="a" * 64, cache=cache)
    assert len(calls) == 1
    assert first.facts == again.facts
    plain = write_store(tmp_path / "plain", [str(text)], tokenizer, 280, key="a" * 64)
    assert plain.facts == first.facts
    # Another text in the same folder leaves what the cache holds alone.
    text.write_text("War. " * 90)
    write_store(tmp_path / "two", [str(text)], tokenizer, 280, key="b" * 64)
    third = write_store(tmp_path / "three", ["nowhere.txt"], tokenizer, 280, key="a" * 64, cache=cache)
    assert third.facts == first.facts
    assert torch.equal(third.read(np.array([0]), 16).input_ids, plain.read(np.array([0]), 16).input_ids)


def test_a_tokenizer_of_remote_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at the terminal, and a yes would run the checkpoint's own file."""
    from rehead.checkpoints.opening import open_source
    from rehead.data.calibration import _tokenizer
    from rehead.recipes.evaluation.models import tokenizer_of

    tiny.save_tiny("llama", tmp_path / "model")
    named = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    ran = tmp_path / "ran"
    (tmp_path / "model" / "tokenization_x.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass X: ...\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    source = open_source(tmp_path / "model")
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        load_tokenizer(source)
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        _tokenizer(source)
    assert tokenizer_of(source) is None
    assert not asked
    assert not ran.exists()
