"""Perplexity against three referees: a plain loop, transformers' guide, and lm-evaluation-harness's own code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rehead.benchmarks.perplexity import guide_loop, plain_loop
from rehead.errors import UnsupportedError, UsageError
from rehead.recipes.evaluation.bootstrap import interval
from rehead.recipes.evaluation.perplexity import described, perplexity, prefix_token, window_losses


@pytest.mark.parametrize("window", [32, 100])
def test_disjoint_equals_a_plain_loop(load, original, tokens, window):
    model = load(original)
    found = perplexity(model, tokens, window)
    assert found.value == pytest.approx(plain_loop(model, tokens, window), rel=1e-5)
    assert found.counts.sum() == len(tokens) // window * (window - 1)


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (64, 64), (100, 37)])
def test_strided_equals_the_guide(load, original, tokens, window, stride):
    model = load(original)
    found = window_losses(model, tokens, "strided", window, stride)
    assert found.value == pytest.approx(guide_loop(model, tokens, window, stride), rel=1e-5)
    without_context = -(-len(tokens) // window) if stride == window else 1
    assert found.counts.sum() == len(tokens) - without_context


@pytest.mark.parametrize("window", [48, 128])
def test_rolling_equals_the_harness(load, original, tokenizer, text, window):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from rehead.recipes.evaluation.tasks import quiet_harness

    model = load(original)
    content = text.read_text()
    with quiet_harness():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=4)
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(content,), idx=0)
        theirs = harness.loglikelihood_rolling([request], disable_tqdm=True)[0]
        tokens = torch.tensor(harness.tok_encode(content))
    found = window_losses(model, tokens, "rolling", window, prefix=prefix_token(tokenizer))
    assert found.counts.sum() == len(tokens)
    assert -found.losses.sum() == pytest.approx(theirs, rel=1e-6)
    # The harness's word_perplexity and bits_per_byte are this number over words and bytes.
    size = len(content.encode())
    row = described(found, "model", "text", bytes_per_token=size / len(tokens))
    assert row.bits_per_byte == pytest.approx(-theirs / size / math.log(2), rel=1e-6)


def test_conventions_differ_as_context_does(load, copying_model):
    """On a text that repeats every 24 tokens, a model that copies profits from context: strided must show it."""
    tokens = torch.randint(0, 500, (24,), generator=torch.Generator().manual_seed(0)).repeat(20)
    model = copying_model()
    afresh = window_losses(model, tokens, "disjoint", 48).mean
    overlapping = window_losses(model, tokens, "strided", 48, 12).mean
    assert overlapping < 0.75 * afresh


def test_batch_size_and_training_mode_do_not_matter(load, original, tokens):
    model = load(original)
    model.train()
    small = window_losses(model, tokens, "strided", 64, batch_tokens=64)
    large = window_losses(model, tokens, "strided", 64, batch_tokens=4096)
    assert np.allclose(small.losses, large.losses, rtol=1e-5)
    assert model.training
    assert all(module.training for module in model.modules())


def test_bfloat16_is_named(load, original, tokens):
    model = load(original).to(torch.bfloat16)
    row = described(perplexity(model, tokens, 64), "model", "text")
    assert row.dtype == "bfloat16"
    assert row.value == pytest.approx(perplexity(load(original), tokens, 64).value, rel=0.05)


def test_interval_covers_and_pairs():
    rng = np.random.default_rng(0)
    counts = np.full(50, 63.0)
    hard = rng.normal(3.0, 0.5, 50)  # windows differ much from one another ...
    inside = 0
    for _ in range(100):
        losses = rng.normal(3.0, 0.5, 50) * counts
        low, high = interval(lambda s, c: s / c, losses, counts, resamples=400, seed=int(rng.integers(1 << 30)))
        inside += low <= 3.0 <= high
    assert 86 <= inside <= 100  # of 100 draws; the percentile bootstrap is a little narrow at 50 windows
    ratio = interval(  # ... and little from one model to the next, which only pairs can see
        lambda a, b, c: np.exp((a - b) / c), (hard + 0.1 + rng.normal(0, 0.01, 50)) * counts, hard * counts, counts
    )
    assert ratio[0] > math.exp(0.09)
    assert ratio[1] < math.exp(0.11)
    assert interval(lambda s: s, np.ones(7)) is None


def test_broken_models_and_texts_are_one_line(load, original, tokens):
    model = load(original)
    with pytest.raises(UsageError, match="neither"):
        window_losses(model, tokens, "rolling", 64)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UnsupportedError, match="the converted: gives no finite probability"):
        window_losses(model, tokens, "disjoint", 64, name="the converted")


def test_an_interval_holds_95_of_100_draws_as_many_left_out_on_either_side():
    """Of a mean over many windows, the normal distribution says where it ends."""
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = interval(lambda s: s / 400, values, resamples=20000)
    reach = 1.96 * values.std() / 20
    assert [values.mean() - low, high - values.mean()] == pytest.approx([reach, reach], rel=0.04)
    assert interval(lambda s: s / 400, values, resamples=200, seed=1) == interval(
        lambda s: s / 400, values, resamples=200, seed=1
    )
    assert interval(lambda s: s / 400, values, resamples=200, seed=2) != interval(
        lambda s: s / 400, values, resamples=200, seed=1
    )
