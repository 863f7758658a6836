"""A planted sink logit is found again, and heads that look near lose nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import loaded

from rehead.attention.install import installation
from rehead.convert import convert, verify
from rehead.convert.calibrated import calibration_text
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import make_plan
from rehead.errors import UsageError
from rehead.models.model import open_model
from rehead.patches import patch_model
from rehead.variants.stack import stack_of
from rehead.variants.window.sink_logit import OFF, best, errors, worth

IDS = torch.randint(0, tiny.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", [False, True])
def test_a_planted_logit_is_recovered(metric: bool) -> None:
    """Outputs that are a factor sigmoid(L - b) of those of the kept keys give b back."""
    generator = torch.Generator().manual_seed(1)
    planted = torch.tensor([-7.3, 0.0, 4.81, 11.0])
    kept = torch.randn(3, 4, 50, 8, generator=generator)
    lse = 3 * torch.randn(3, 4, 50, generator=generator) + planted[:, None]
    whole = torch.sigmoid(lse - planted[:, None])[..., None] * kept
    form = torch.randn(4, 8, 8, generator=generator) if metric else None
    sums = errors(whole, kept, lse, None if form is None else form @ form.transpose(1, 2))
    torch.testing.assert_close(best(sums), planted.double(), atol=2e-3, rtol=0)


def test_heads_that_lose_nothing_get_no_logit() -> None:
    kept = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(2))
    assert bool((best(errors(kept, kept, torch.zeros(2, 3, 40))) < -20).all())


def test_beside_sinks_a_logit_must_be_worth_it() -> None:
    """One that takes all of the error away stays, one that takes a fifth of it goes."""
    generator = torch.Generator().manual_seed(4)
    kept, noise = torch.randn(2, 2, 1, 500, 8, generator=generator)
    lse = torch.zeros(2, 1, 500)
    for noisy, stays in ((0.0, True), (1.0, False)):
        whole = 0.5 * kept + noisy * noise
        logits = best(errors(whole, kept, lse), worth(4))
        assert (float(logits.abs().max()) < 1.0) == stays
        assert float(best(errors(whole, kept, lse), worth(0)).abs().max()) < 1.0


def test_the_live_logit_is_fitted_to_text() -> None:
    model = tiny.tiny_model("llama")
    with patch_model(model, "window", size=6, sink_logit=True, calibration=IDS) as patch:
        fitted = [state.tensors["sinks"].clone() for state in patch.states]
        assert all(bool((logits > -30).all()) for logits in fitted)
        assert patch.measure(distances=[]).ablated is not None
        for state in patch.states:
            assert model.get_submodule(state.name)._parameters["rehead_window_sinks"] is state.tensors["sinks"]
    patch.apply()  # fitted once
    assert all(torch.equal(a, state.tensors["sinks"]) for a, state in zip(fitted, patch.states))
    patch.revert()
    with pytest.raises(UsageError, match="is fitted to text; give calibration="):
        patch_model(model, "window", size=6, sink_logit=True).apply()
    with pytest.raises(UsageError, match="texts of 64 tokens hardly show what it hides; give calibration= of 80"):
        patch_model(model, "window", size=20, sink_logit=True, calibration=IDS).apply()
    assert not model.__dict__.get("_rehead_stack")


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_model_with_fitted_logits_compiles_in_one_graph(sinks: int) -> None:
    model = tiny.tiny_model("llama")
    padded = torch.ones_like(IDS)
    padded[0, :6] = 0
    with patch_model(model, "window", size=6, sinks=sinks, sink_logit=True, calibration=IDS) as patch, torch.no_grad():
        for state in patch.states:  # whatever was fitted, this takes a share
            state.tensors["sinks"].fill_(0.5)
        plain = model(IDS, attention_mask=padded).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(IDS, attention_mask=padded).logits
        torch.testing.assert_close(compiled[padded.bool()], plain[padded.bool()], atol=1e-5, rtol=1e-5)
        assert float((plain - _without(patch, padded)).abs().max()) > 1e-3


def _without(patch, padded):
    with patch.only(()):
        return patch.model(IDS, attention_mask=padded).logits


def test_a_fit_that_fails_leaves_the_layers_own_functions() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("while fitting")

    model = tiny.tiny_model("llama")
    with patch_model(model, "window", size=4), patch_model(model, "temperature", start=1.5):
        before = [list(layer.variants) for layer in installation(model).layers]
        logits = model(IDS).logits
        live = stack_of(model)[0]
        with pytest.raises(RuntimeError, match="while fitting"), live.computing(broken):
            model(IDS)
        assert [layer.variants for layer in installation(model).layers] == before
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("seed", range(4))
def test_beside_sink_tokens_a_logit_never_hurts(seed: int) -> None:
    """On the texts that decide: every other one, which the logits are not fitted to."""
    from rehead.models.distance import distances

    torch.manual_seed(seed)
    model = tiny.tiny_model("llama")
    tokens = torch.randint(0, tiny.VOCAB, (4, 64))
    with torch.no_grad():
        original = model(tokens[1::2]).logits
        kl = {}
        for logit in (False, True):
            options = {"sink_logit": True, "calibration": tokens} if logit else {}
            with patch_model(model, "window", size=6, sinks=2, **options):
                kl[logit] = distances(original, model(tokens[1::2]).logits).mean_kl
    assert kl[True] <= kl[False] * (1 + 1e-6)


def test_a_logit_that_takes_the_model_away_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that promise much from a logit which halves every head are overruled by the whole model."""
    from rehead.variants.window import live_logit

    def wrong(whole, kept, lse, metric=None):
        return errors(0.3 * kept, kept, torch.zeros_like(lse), None)

    model = tiny.tiny_model("llama")
    tokens = torch.randint(0, tiny.VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(live_logit, "errors", wrong)
    with patch_model(model, "window", size=6, sinks=4, sink_logit=True, calibration=tokens) as patch:
        assert all(bool((state.tensors["sinks"] == OFF).all()) for state in patch.states)


def test_saved_logits_are_those_of_the_layer_on_its_converted_prefix(tmp_path) -> None:
    """Live and saved fit the same thing: with every query observed, they agree."""
    source = tiny.save_tiny("llama", tmp_path / "source")
    options = {"calibration": ["random"], "calibration_tokens": 64, "calibration_length": 32}
    convert(source, tmp_path / "out", window=5, layers="0", sink_logit=True, **options)
    saved = loaded(tmp_path / "out").model.layers[0].self_attn.sinks
    plan = make_plan(open_model(source), ConvertOptions(window=5, layers="0", sink_logit=True, **options))
    tokens = calibration_text(plan).tokens[0]
    live = loaded(source)
    with patch_model(live, "window", size=5, layers=[0], sink_logit=True, calibration=tokens) as patch:
        ours = patch.states[0].tensors["sinks"]
    torch.testing.assert_close(ours, saved, atol=1e-3, rtol=0)
    assert verify(tmp_path / "out", str(source))
