"""Divergence: exact where it must be, equal to the formula elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rehead.errors import UnsupportedError, UsageError
from rehead.models.distance import distances, token_nll
from rehead.recipes.evaluation.divergence import compare, described


def test_a_model_is_no_distance_from_itself(load, original, tokens):
    model, same = load(original), load(original)
    for other in (model, same):
        found = compare(model, {"model": other}, tokens, 64)["model"]
        assert found.tokens.kl.max() == 0
        assert found.kl == 0
        assert found.top1_agreement == 1
        assert found.perplexity == found.baseline_perplexity
    row = described(found, "model", "text")
    assert (row.mean, row.median, row.max, row.low, row.high) == (0, 0, 0, 0, 0)
    assert (row.delta_p.mean, row.delta_p.std, row.delta_p.p1) == (0, 0, 0)


def test_figures_equal_the_formula(load, original, converted, tokens):
    baseline, model = load(original), load(converted)
    window = 64
    row = described(compare(baseline, {"model": model}, tokens, window)["model"], "model", "text")
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    with torch.no_grad():
        log_p, log_q = (one(input_ids=rows).logits[:, :-1].double().log_softmax(-1) for one in (baseline, model))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).flatten().numpy()
    right = rows[:, 1:, None]
    change = (log_q.exp().gather(-1, right) - log_p.exp().gather(-1, right)).flatten().numpy()
    assert row.tokens == len(kl)
    assert row.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert row.mean > 0.1  # or nothing was tested
    assert [row.median, row.p99, row.p999] == pytest.approx(np.quantile(kl, [0.5, 0.99, 0.999]), rel=1e-4)
    assert row.max == pytest.approx(kl.max(), rel=1e-4)
    assert row.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    assert row.delta_p.mean == pytest.approx(change.mean(), abs=1e-6)
    assert row.delta_p.std == pytest.approx(change.std(), rel=1e-4)
    assert row.delta_p.p1 == pytest.approx(np.quantile(change, 0.01), abs=1e-5)
    assert row.low < row.mean < row.high
    assert sum(row.histogram.counts) == row.tokens
    assert np.histogram(kl, row.histogram.edges)[0].tolist() == row.histogram.counts


def test_several_models_in_one_pass(load, original, converted, control, tokens):
    """The baseline runs once for all, each result is what it is alone, the control is nearer than the conversion."""
    baseline = load(original)
    passes = []
    baseline.register_forward_hook(lambda *_: passes.append(1))
    models = {"model": load(converted), "control": load(control)}
    both = compare(baseline, models, tokens, 64, batch_tokens=512)
    count = len(passes)
    alone = compare(baseline, {"model": models["model"]}, tokens, 64, batch_tokens=512)["model"]
    assert len(passes) == 2 * count
    assert torch.equal(alone.tokens.kl, both["model"].tokens.kl)
    assert 0 < both["control"].kl < 0.1 * both["model"].kl


def test_a_model_in_training_may_be_measured(load, original, converted, tokens):
    student = load(converted).train()
    student.model.layers[0].eval()  # whatever mix of modes there was
    modes = [module.training for module in student.modules()]
    compare(load(original), {"model": student}, tokens[:256], 64)
    assert [module.training for module in student.modules()] == modes
    loss = student(input_ids=tokens[None, :32], labels=tokens[None, :32]).loss
    loss.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, 97, generator=generator).to(dtype) * 5 for _ in range(2))
    right = torch.randint(0, 97, (50,), generator=generator)
    whole = distances(first, second, right)
    monkeypatch.setattr("rehead.models.distance._STEP_BYTES", {"cpu": 1, "cuda": 1})
    single = distances(first, second, right)
    assert torch.equal(whole.kl, single.kl)
    assert torch.equal(whole.nll, single.nll)
    assert torch.equal(token_nll(second, right), whole.nll)


def test_entries_that_both_rule_out_weigh_nothing():
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 0.0, 0.0]])
    found = distances(logits, logits.clone(), torch.tensor([0, 1]))
    assert found.kl.tolist() == [0, 0]
    other = logits.clone()
    other[0, 1] = -torch.inf
    assert distances(logits, other, torch.tensor([0, 1])).kl[0] == torch.inf


def test_different_vocabularies_and_broken_models(load, original, copying_model, tokens):
    model = load(original)
    with pytest.raises(UsageError, match="vocabulary of 512"):
        compare(model, {"model": copying_model()}, tokens, 64)
    broken = load(original)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    with pytest.raises(UnsupportedError, match="theirs: gives no finite"):
        compare(model, {"model": broken}, tokens, 64, names={"model": "theirs"})
    with pytest.raises(UsageError, match="shorter than one window"):
        compare(model, {"model": model}, tokens[:10], 64)
