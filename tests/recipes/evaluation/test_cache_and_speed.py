"""KV bytes a token computed and measured; speed's bookkeeping (its figures are the machine's)."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from rehead.benchmarks.tiny import tiny_model
from rehead.models.cache_layouts import config_layouts, layer_window
from rehead.models.layout import bytes_per_token, cache_bytes
from rehead.models.modeling.modeling_rehead_cache import returned_cache
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation import speed
from rehead.recipes.evaluation.kv_cache import (
    _tensors,
    cache_note,
    cache_row,
    measure_cache,
    stated_heads,
)

DENSE = ["llama", "gpt2", "falcon", "gpt_bigcode", "qwen3", "gemma2", "phi3", "opt", "mistral", "gpt_neox", "glm4"]


@pytest.mark.parametrize("kind", DENSE)
def test_the_config_promises_what_is_kept(kind):
    model = tiny_model(kind)
    found = measure_cache(model)
    computed = bytes_per_token(config_layouts(model.config, 4))
    assert found.bytes_per_token == computed > 0
    assert bytes_per_token(config_layouts(model.config, 2)) == computed / 2


@pytest.mark.parametrize("kind", [*DENSE, "gemma3_text", "jamba", "deepseek_v2", "mamba2", "llama4_text"])
def test_a_filled_cache_is_as_large_as_one_that_was_read(kind):
    """Windows of 16 tokens are full at 40; states of recurrent layers do not grow."""
    model = tiny_model(kind)
    found = measure_cache(model)
    tokens = torch.randint(8, 120, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = returned_cache(model(input_ids=tokens, use_cache=True))
    assert (found is None) == (cache is None)
    if cache is not None:
        assert found.bytes_at(40) == sum(tensor.nbytes for tensor in _tensors(cache))


def test_a_window_is_measured_as_what_it_is_at_long_contexts():
    """Gemma 3's pattern: the layout, a cache of transformers' own, and arithmetic by hand say the same."""
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    model = tiny_model("gemma3_text", num_hidden_layers=6, layer_types=pattern, sliding_window=512,
                       max_position_embeddings=32768)  # fmt: skip
    assert [layer_window(model.config, i) for i in range(6)] == [512] * 5 + [None]
    row = cache_row("model", model, torch.bfloat16, config_layouts(model.config))
    each = bytes_per_token(config_layouts(model.config)) / 6
    assert [size.context for size in row.sizes] == [1024, 8192, 32768]
    for size in row.sizes:
        assert size.computed_bytes == size.measured_bytes == each * (size.context + 5 * 511)
        assert row.bytes_at(size.context) == cache_bytes(config_layouts(model.config), size.context)
    assert row.measured_bytes_per_token == row.computed_bytes_per_token == 6 * each


def test_an_older_document_has_bytes_at_any_context():
    row = schema.KVCache(who="model", computed_bytes_per_token=None, measured_bytes_per_token=96.0, dtype="bfloat16")
    assert row.bytes_at(1000) == 96_000


def test_states_of_fixed_size_are_no_bytes_a_token():
    hybrid = measure_cache(tiny_model("jamba"))
    assert hybrid.bytes_per_token > 0
    assert len(hybrid.heads) < tiny_model("jamba").config.num_hidden_layers
    assert measure_cache(tiny_model("mamba")) is None or measure_cache(tiny_model("mamba")).bytes_per_token == 0


def test_a_conversion_keeps_a_quarter(load, original, converted):
    before, after = measure_cache(load(original)), measure_cache(load(converted))
    assert before.heads == [4, 4, 4]
    assert after.heads == [1, 1, 1]
    assert before.bytes_per_token == 3 * 2 * 4 * 8 * 4
    assert after.bytes_per_token == before.bytes_per_token / 4
    assert before.head_dim == after.head_dim == 8


def test_speed_takes_turns_and_counts_tokens(load, original, converted, monkeypatch):
    order = []
    clock = iter(range(10**6))
    monkeypatch.setattr(speed, "clock", lambda device: float(next(clock)))
    models = {"model": load(converted), "baseline": load(original)}
    for who, model in models.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, who=who: order.append((who, tuple(kwargs["input_ids"].shape))),
            with_kwargs=True,
        )
    rows, notes = speed.speed_rows(models, {}, [1, 2], [16], repeats=3)
    assert not notes
    assert {(row.who, row.phase, row.batch, row.context) for row in rows} == {
        (who, phase, batch, 16) for who in models for phase in ("prefill", "decode") for batch in (1, 2)
    }
    for row in rows:  # a clock that ticks once for each look at it: every pass takes one second
        assert row.seconds == 1
        assert row.tokens_per_second == (row.batch * 16 if row.phase == "prefill" else row.batch)
        assert row.repeats == 3
        assert row.low == row.high == row.tokens_per_second
        assert (row.ratio is None) == (row.who == "baseline")
    prefills = [who for who, shape in order if shape == (2, 16)]
    assert prefills == ["model", "baseline", "baseline", "model"] * 2  # in turns, one round to warm up
    assert order.count(("model", (2, 1))) == 4 * (speed.STEPS + 1)


def test_sizes_that_do_not_fit_are_noted(load, original, monkeypatch):
    models = {"model": load(original)}
    rows, notes = speed.speed_rows(models, {}, [1], [16, 510], repeats=1)
    assert {row.context for row in rows} == {16}
    assert notes == ["speed at batch 1, context 510 left out: the model has positions for 512"]
    monkeypatch.setattr(speed, "_available_memory", lambda: 1e6)
    rows, notes = speed.speed_rows(models, {"model": 768.0}, [1, 64], [16], repeats=1)
    assert {row.batch for row in rows} == {1}
    assert "cache would need" in notes[0]


def test_running_out_of_memory_is_noted(load, original, monkeypatch):
    allocated, left = [], []

    def refuse(*_):
        cache = torch.empty(8)
        allocated.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed, "_once", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(allocated[-1]() is not None))
    rows, notes = speed.speed_rows({"model": load(original)}, {}, [1], [16])
    assert rows == []
    assert left == [False]
    assert notes == ["speed at batch 1, context 16 left out: out of memory"]


def test_heads_that_are_repeated_before_they_are_cached_are_told_of():
    shape = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = FalconForCausalLM(FalconConfig(**shape, num_kv_heads=2, new_decoder_architecture=True)).eval()
    row = cache_row("model", model, torch.bfloat16, config_layouts(model.config))
    assert row.measured_bytes_per_token == 4 * row.computed_bytes_per_token
    assert stated_heads(model.config, measure_cache(model).heads) == [2, 2]
    note = cache_note(row, "falcon")
    assert "caches 4 times the model's KV heads" in note
    assert "holds 128 bytes per token, not 512" in note
    plain = tiny_model("llama")
    assert cache_note(cache_row("model", plain, torch.bfloat16, config_layouts(plain.config)), "llama") is None
    assert stated_heads(plain.config, [2, 2]) == [2, 2]


def test_a_model_without_a_cache_is_not_timed():
    rows, notes = speed.speed_rows({"model": tiny_model("openai-gpt")}, {}, [1], [16], repeats=1)
    assert not rows
    assert notes == ["speed left out: openai-gpt gives back no KV cache to decode with"]


@pytest.mark.parametrize(
    ("values", "interval"),
    [([3.0], (None, 3, None)), ([5.0, 1, 3], (1, 3, 5)), (range(1, 7), (1, 3.5, 6)), (range(1, 9), (1, 4.5, 8)),
     (range(1, 10), (2, 5, 8)), (range(1, 101), (40, 50.5, 61))],
)  # fmt: skip
def test_intervals_of_medians_are_those_of_the_tables(values, interval):
    """Conover's tables of order statistics for 95%: of 9 values the second and eighth, of 100 the 40th and 61st."""
    result = speed.median_interval(list(map(float, values)))
    assert (result.low, result.value, result.high) == interval


def test_intervals_hold_the_median_as_often_as_they_say():
    draw = torch.Generator().manual_seed(0)
    found = [speed.median_interval(row.exp().tolist()) for row in torch.randn(4000, 9, generator=draw)]
    held = sum(one.low <= 1 <= one.high for one in found) / len(found)  # the median of exp(normal) is 1
    assert 0.95 < held < 0.975  # 96.1% by the binomial distribution
