"""Dual chunks and Self-Extend: the positions that each pair of tokens is given, against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from copying import copying
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import no_gpu, passes_interpreted, triton_there
from transformers import DynamicCache, StaticCache

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError, UsageError
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.models.recall import recall, recall_texts
from rehead.models.rotation import Turn, turn_of
from rehead.patches import patch_model
from rehead.variants import dual_chunk, self_extend
from rehead.variants.dual_chunk import DualChunkOptions
from rehead.variants.positions import Placed
from rehead.variants.self_extend import SelfExtendOptions

ANGLES = 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
WORDS = torch.arange(8, 200)


def reference(call, distance):
    """Attention in float64 whose score of row i and key j is that of queries and keys ``distance(i, j)`` apart."""
    turn, still = Turn(ANGLES), torch.zeros(1, dtype=torch.long)
    group = call.query.shape[1] // call.key.shape[1]
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for row in range(query.shape[2]):
        at = row + call.q_offset
        plain = turn.by(query[:, :, row : row + 1].float(), still - at).double()  # as before it was rotated
        steps = torch.tensor([distance(at, j) for j in range(at + 1)])
        keys = torch.cat([turn.by(key[:, :, j : j + 1].float(), still - j).double() for j in range(at + 1)], 2)
        moved = turn.by(keys.float(), -steps).double()
        scores = (plain * moved).sum(-1) * call.factor
        out[:, :, row] = (scores.softmax(-1)[..., None] * value[:, :, : at + 1]).sum(2)
    return out.transpose(1, 2)


def call_of(rows, keys, seed=0, heads=4, kv=2):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, rows, 8, generator=draw)
    key, value = (torch.randn(2, kv, keys, 8, generator=draw) for _ in range(2))
    return AttentionCall(query, key, value, q_offset=keys - rows)


def options_of(cls, **told):
    return Placed(cls.parse(told), told["trained"], Turn(ANGLES))


@given(st.integers(2, 30), st.integers(1, 29), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_dual_chunks_are_their_definition(trained, chunk, keys, seed):
    options = options_of(DualChunkOptions, trained=trained, chunk=chunk)
    size, call = dual_chunk.chunk_size(options), call_of(min(keys, 1 + seed * 20), keys, seed)

    def distance(i, j):
        if i < trained:
            return i - j
        if i // size - j // size <= 1:
            held = i if i // size == j // size else min(i, j // size * size + trained - 1)
            return held - j
        return trained - 1 - j % size

    assert all(0 <= distance(i, j) < trained or i // size == j // size for i in range(keys) for j in range(i + 1))
    got = dual_chunk.attend(call, options, {}, attend)
    torch.testing.assert_close(got.double(), reference(call, distance), atol=2e-5, rtol=2e-5)
    if keys <= trained:
        assert torch.equal(got, attend(call))


@given(st.integers(2, 30), st.integers(2, 6), st.integers(1, 29), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_self_extend_is_its_definition(trained, group, neighbours, keys, seed):
    options = options_of(SelfExtendOptions, trained=trained, group=group, neighbours=neighbours)
    near, most, call = (
        self_extend.near_keys(options),
        self_extend.reach(options),
        call_of(min(keys, 1 + seed * 20), keys, seed),
    )
    if keys > max(most, trained):
        with pytest.raises(UsageError, match=r"give group=\d+ or more"):
            self_extend.attend(call, options, {}, attend)
        return

    def distance(i, j):
        if i < trained or i - j < near:
            return i - j
        return i // group + near - near // group - j // group

    assert all(0 <= distance(i, j) < trained + group for i in range(keys) for j in range(i + 1))
    if keys > most:
        return
    got = self_extend.attend(call, options, {}, attend)
    torch.testing.assert_close(got.double(), reference(call, distance), atol=2e-5, rtol=2e-5)


@given(st.integers(-500, 500), st.integers(-500, 500), st.booleans())
@settings(max_examples=40, deadline=None)
def test_turns_add_up_and_keep_lengths(first, second, interleaved):
    turn = Turn(ANGLES, interleaved)
    states = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(abs(first)))
    once = turn.by(states, torch.tensor([first + second]))
    torch.testing.assert_close(turn.by(turn.by(states, torch.tensor([first])), torch.tensor([second])), once,
                               atol=1e-5, rtol=1e-5)  # fmt: skip
    assert once.norm() == pytest.approx(float(states.norm()), rel=1e-5)
    assert torch.equal(once[..., 6:], states[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_long_texts_are_turned_in_pieces_and_remembered(interleaved):
    turn = Turn(ANGLES, interleaved)
    states, place = torch.randn(1, 2, 1100, 8), torch.arange(1100)
    with torch.no_grad():
        waves = turn.grouped(4, 1100, states.device)
        assert turn.grouped(4, 1000, states.device)[0].data_ptr() == waves[0].data_ptr()
        got, rows = (
            turn.by(states, waves),
            torch.cat(
                [
                    turn.by(part, place[at : at + 100] // 4 - place[at : at + 100])
                    for at, part in zip(range(0, 1100, 100), states.split(100, 2))
                ],
                2,
            ),
        )
    assert torch.equal(got, rows)
    learned = states.clone().requires_grad_()
    turn.by(learned, waves).square().sum().backward()
    torch.testing.assert_close(learned.grad, 2 * states, atol=1e-5, rtol=1e-5)
    folded = dual_chunk._folded(states, 220, turn)
    torch.testing.assert_close(folded, turn.by(states, -(place // 220 * 220)))


def test_few_rows_are_turned_where_many_turn_the_keys(monkeypatch):
    """One function either way: a row alone, as in decoding, and the same among many."""
    options, call = options_of(DualChunkOptions, trained=12, chunk=8), call_of(60, 60)
    whole = dual_chunk.attend(call, options, {}, attend)
    folds = []
    monkeypatch.setattr(dual_chunk, "_folded", lambda *told: folds.append(told))
    for row in (31, 47, 59):
        last = call.with_(query=call.query[:, :, row : row + 1], key=call.key[:, :, : row + 1],
                          value=call.value[:, :, : row + 1], q_offset=row)  # fmt: skip
        torch.testing.assert_close(dual_chunk.attend(last, options, {}, attend), whole[:, row : row + 1],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
    assert not folds


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm", "gptj", "cohere", "phi3", "smollm3", "gpt_neox", "falcon"])
def test_a_turn_is_what_the_class_does(kind, monkeypatch):
    """Positions moved by the model and back by turns give the model's own function."""
    model = tiny_model(kind)
    tokens = torch.randint(8, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        # Chunks of 8 within 24 trained tokens: every second chunk is turned, to where it was.
        with patch_model(model, "dual_chunk", trained=24, chunk=8):
            got = model(tokens, use_cache=False).logits
        torch.testing.assert_close(got, plain, atol=2e-5 * float(plain.abs().max()), rtol=1e-4)
        config = model.config
        layer = next(i for i in range(config.num_hidden_layers) if turn_of(config, i) is not None)
        assert len(turn_of(config, layer).angles) >= 1
        monkeypatch.setattr(self_extend, "reach", lambda placed: 99)  # groups of one change no distance
        with patch_model(model, "self_extend", trained=9, group=1, neighbours=4):
            got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, plain, atol=2e-5 * float(plain.abs().max()), rtol=1e-4)


def test_a_planted_model_copies_from_beyond_its_length():
    model = copying(local=True)
    texts = recall_texts(torch.arange(200, 500).repeat(5), [64, 512], kinds=["copy"], words=WORDS, trials=2)
    near, far = recall(model, texts)
    assert near.top1 > 0.98
    assert far.top1 < 0.1
    for name, told in (("dual_chunk", {"chunk": 96}), ("dual_chunk", {"chunk": 64}), ("self_extend", {"group": 16})):
        with patch_model(model, name, trained=128, **told):
            assert recall(model, texts[1:])[0].top1 > 0.98, name
            assert recall(model, texts[:1])[0].top1 > 0.98, name


def test_a_window_with_sinks_streams_beyond_the_trained_length():
    """The variant ``window`` is what runs without end: distances to all but the first tokens stay within the window."""
    model = copying(local=True)
    texts = recall_texts(torch.arange(200, 500).repeat(5), [32], kinds=["copy"], words=WORDS, trials=2)
    long = torch.cat([torch.arange(200, 500).repeat(5)[None, :1500].expand(2, -1), texts[0].tokens], 1)
    with patch_model(model, "window", size=128, sinks=2), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for part in long.split(200, 1):
            logits = model(part, **cache_argument(cache)).logits
        assert cache.layers[0].keys.shape[2] <= 130
        whole = model(long, use_cache=False).logits
    torch.testing.assert_close(logits[:, -20:], whole[:, -20:], atol=1e-3, rtol=1e-3)
    hits = whole[:, -32:-1].argmax(-1) == long[:, -31:]
    assert float(hits[:, 1:].float().mean()) > 0.9


@pytest.mark.parametrize(("name", "told"), [
    ("dual_chunk", {"trained": 16, "chunk": 8}), ("self_extend", {"trained": 16, "group": 8, "neighbours": 4}),
])  # fmt: skip
def test_padding_and_static_caches_change_nothing(name, told):
    model = tiny_model("llama")
    tokens = torch.randint(8, 100, (2, 40), generator=torch.Generator().manual_seed(2))
    short = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[:1, 5:]], 1)
    rows = torch.cat([short, tokens[1:]])
    mask = torch.ones_like(rows)
    mask[0, :5] = 0
    with patch_model(model, name, **told), torch.no_grad():
        alone = model(tokens[:1, 5:], use_cache=False).logits
        padded = model(rows, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(padded[:1, 5:], alone, atol=1e-4, rtol=1e-4)
        cache = StaticCache(config=model.config, max_cache_len=48)
        steps = [model(tokens[1:, a:b], **cache_argument(cache)).logits for a, b in ((0, 30), (30, 31), (31, 40))]
        torch.testing.assert_close(torch.cat(steps, 1), padded[1:], atol=1e-4, rtol=1e-4)
        written = model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False)
        again = model.generate(rows, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(written, again)


def test_variants_below_are_kept():
    """A temperature and a window below dual chunks reach every part."""
    model = tiny_model("llama")
    tokens = torch.randint(8, 100, (1, 40), generator=torch.Generator().manual_seed(2))
    told = {"trained": 16, "chunk": 8}
    with torch.no_grad():
        with patch_model(model, "temperature", start=1.7), patch_model(model, "dual_chunk", **told):
            below = model(tokens, use_cache=False).logits
        with patch_model(model, "dual_chunk", **told), patch_model(model, "temperature", start=1.7):
            above = model(tokens, use_cache=False).logits
        torch.testing.assert_close(below, above, atol=1e-4, rtol=1e-4)
        with patch_model(model, "window", size=7):
            narrow = model(tokens, use_cache=False).logits
            with patch_model(model, "dual_chunk", **told):
                torch.testing.assert_close(model(tokens, use_cache=False).logits, narrow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changes", "said"), [
    ("gpt2", {}, "do not rotate"), ("hunyuan_v1_dense", {}, "norms queries and keys after"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "no fixed turn"),
    ("deepseek_v3", {}, "is not known"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(kind, changes, said):
    model = tiny_model(kind, **changes)
    tokens = torch.randint(8, 100, (1, 12))
    before = model(tokens, use_cache=False).logits
    with pytest.raises(UnsupportedError, match=said):
        patch_model(model, "dual_chunk", trained=8).apply()
    assert torch.equal(model(tokens, use_cache=False).logits, before)


def test_packed_texts_and_masks_of_values_are_refused():
    options, call = options_of(DualChunkOptions, trained=8, chunk=4), call_of(20, 20)
    for rule in ({"bias": torch.zeros(1, 1, 20, 20)}, {"q_segments": torch.zeros(2, 20, dtype=torch.int32),
                 "kv_segments": torch.zeros(2, 20, dtype=torch.int32)}, {"chunk": 4}, {"window": 12}):  # fmt: skip
        with pytest.raises(UnsupportedError, match="causal and padding masks only"):
            dual_chunk.attend(call.with_(**rule), options, {}, attend)
    assert torch.equal(dual_chunk.attend(call.with_(window=8), options, {}, attend), attend(call.with_(window=8)))


@no_gpu
@triton_there
def test_in_the_interpreter():
    passes_interpreted(Path(__file__).with_name("positions_kernels.py"))
