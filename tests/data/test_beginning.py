"""Sequences begin as their tokenizer begins a text: windows, rows of packed documents, held-out text, and referees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rehead.benchmarks.tiny import tiny_model
from rehead.data.beginning import IGNORED, begun, text_start, uncounted
from rehead.data.store import TokenStore, write_store
from rehead.recipes.evaluation.damage import layer_damage
from rehead.recipes.evaluation.divergence import compare
from rehead.recipes.evaluation.needle import prompt
from rehead.recipes.evaluation.perplexity import window_losses
from rehead.recipes.training.losses import StudentWithLoss
from rehead.recipes.training.processes import join_processes
from rehead.recipes.training.texts import HeldOut, evaluate_held_out

BOS, EOS = 1, 2


class Letters:
    """A token for each character, between the special tokens that are asked for."""

    eos_token_id, bos_token_id, all_special_ids = EOS, BOS, (BOS, EOS)

    def __init__(self, before=(BOS,), after=()):
        self.before, self.after = list(before), list(after)

    def __call__(self, text, add_special_tokens=True):
        many = [text] if isinstance(text, str) else text
        rows = [[3 + ord(c) % 100 for c in one] for one in many]
        if add_special_tokens:
            rows = [[*self.before, *row, *self.after] for row in rows]
        return type("Ids", (), {"input_ids": rows[0] if isinstance(text, str) else rows})

    def __len__(self):
        return 128

    def batch_decode(self, rows, **options):
        return [f" word{row[0]}" for row in rows]

    def convert_ids_to_tokens(self, ids):
        return [f"Ġword{i}" for i in ids]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(8, 128, (260,), generator=torch.Generator().manual_seed(0))


def seen_by(model, run):
    """The rows that a model reads during a call."""
    rows = []
    hook = model.register_forward_pre_hook(lambda m, args, given: rows.append(given["input_ids"]), with_kwargs=True)
    try:
        return run(), rows
    finally:
        hook.remove()


@pytest.mark.parametrize(("before", "after"), [((), ()), ((BOS,), ()), ((BOS,), (EOS,)), ((5, BOS), ()), ((), (EOS,))])
def test_the_start_is_what_the_tokenizer_adds_before_a_text(before, after):
    assert text_start(Letters(before, after)).tolist() == list(before)
    assert not len(text_start(None))


def test_rows_keep_their_length_and_nothing_begins_twice():
    rows, start = torch.tensor([[7, 8, 9], [BOS, 8, 9], [2, BOS, 9]]), torch.tensor([BOS])
    assert begun(rows, start).tolist() == [[BOS, 8, 9], [BOS, 8, 9], [2, BOS, 9]]
    assert torch.equal(begun(rows, torch.tensor([], dtype=torch.int64)), rows)
    assert uncounted(rows, start).tolist() == [[7, 8, 9], [IGNORED, 8, 9], [2, IGNORED, 9]]


@pytest.mark.parametrize("convention", ["disjoint", "strided"])
def test_every_window_begins_so_and_a_plain_loop_agrees(model, tokens, convention):
    start = torch.tensor([BOS])
    options = {"start": start, "batch_tokens": 32}
    losses, rows = seen_by(model, lambda: window_losses(model, tokens, convention, 32, 32, **options))
    assert all((part[:, 0] == BOS).all() for part in rows)
    assert losses.bos == "each window"
    if convention == "disjoint":
        windows = tokens[: len(tokens) // 32 * 32].view(-1, 32).clone()
        windows[:, 0] = BOS
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss
        assert losses.value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    without = window_losses(model, tokens, convention, 32, 32)
    assert np.array_equal(losses.counts, without.counts)
    assert without.bos == "none"
    assert losses.value != without.value


def test_rolling_begins_once_as_the_harness_has_it(model, tokens):
    start = torch.tensor([BOS])
    added = window_losses(model, tokens, "rolling", 32, prefix=BOS, start=start)
    there = window_losses(model, torch.cat([start, tokens]), "rolling", 32, prefix=BOS, start=start)
    plain = window_losses(model, tokens, "rolling", 32, prefix=BOS)
    assert added.value == there.value == plain.value
    assert added.bos == "the text"


def test_where_a_document_begins_inside_a_window_nothing_is_counted(model, tokens):
    text = tokens.clone()
    text[40] = BOS
    losses = window_losses(model, text, "disjoint", 32, start=torch.tensor([BOS]))
    assert losses.counts.tolist() == [31, 30, *[31] * 6]
    other = tiny_model("llama")
    torch.nn.init.normal_(other.lm_head.weight)
    compared = compare(model, {"other": other.eval()}, text, 32, start=torch.tensor([BOS]))["other"]
    assert len(compared.tokens.kl) == int(losses.counts.sum())
    assert compared.baseline_losses.value == pytest.approx(losses.value, rel=1e-9)


def test_damage_reads_windows_that_begin_so(model, tokens):
    other = tiny_model("llama").eval()
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.mul_(0.5)
    rows, read = seen_by(model, lambda: layer_damage(model, other, tokens, 32, start=torch.tensor([BOS])))
    assert all((part[:, 0] == BOS).all() for part in read)
    assert rows[0].tokens == 8 * 31


def test_a_needle_stands_in_a_text_that_begins_so(tokens):
    row = prompt(tokens, torch.arange(10, 100), Letters(), 64, 0.5, (0, 1))
    assert int(row[0]) == BOS
    assert int(prompt(tokens, torch.arange(10, 100), Letters(before=()), 64, 0.5, (0, 1))[0]) != BOS


def test_rows_and_packed_documents_begin_so(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(json.dumps({"text": letter * 11}) for letter in "abcdefgh"))
    tokenizer = Letters()
    write_store(tmp_path / "store", [str(file)], tokenizer, 128, key="k")
    plain = TokenStore(tmp_path / "store").read(np.arange(6), 16)
    for isolated in (True, False):
        rows = TokenStore(tmp_path / "store", text_start(tokenizer)).read(np.arange(6), 16, isolated=isolated)
        begins = rows.input_ids[:, 0] == BOS
        assert bool((begins | (rows.input_ids[:, 1] == BOS)).all())
        assert int(begins.sum()) == 5
        assert not bool((rows.input_ids[:, 1:] == BOS).logical_and(rows.input_ids[:, :-1] == BOS).any())
        assert not bool((rows.labels == BOS).any())
    isolated = TokenStore(tmp_path / "store", text_start(tokenizer)).read(np.arange(6), 16)
    assert torch.equal(isolated.labels, plain.labels)
    assert torch.equal(isolated.position_ids, plain.position_ids)
    assert torch.equal(isolated.input_ids[:, 1:], plain.input_ids[:, 1:])
    # Inside a row, a document begins with BOS of its own, at position 0.
    firsts = isolated.input_ids[isolated.position_ids == 0]
    assert int((firsts != BOS).sum()) == 1  # the end of a text right before another begins


def test_held_out_windows_count_as_evaluation_does(model, tokens):
    text = tokens.clone()
    text[40] = BOS
    start = torch.tensor([BOS])
    windows = begun(text[:256].view(-1, 32), start)
    losses = window_losses(model, text[:256], "disjoint", 32, start=start)
    module = StudentWithLoss(model, model)
    figures = evaluate_held_out(module, HeldOut("text", windows, start), join_processes("cpu"), 4)
    assert figures["tokens_counted"] == int(losses.counts.sum())
    assert figures["perplexity"] == pytest.approx(losses.value, rel=1e-4)
