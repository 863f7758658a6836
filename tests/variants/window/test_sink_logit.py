"""A planted sink logit is found again, and heads that look near lose nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import loaded

from rehead.convert import convert, verify
from rehead.convert.calibrated import calibration_text
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import make_plan
from rehead.errors import UsageError
from rehead.models.model import open_model
from rehead.patches import patch_model
from rehead.variants.window.sink_logit import best, errors

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
    torch.testing.assert_close(best(sums, 0), planted.double(), atol=2e-3, rtol=0)


def test_heads_that_lose_nothing_get_no_logit() -> None:
    kept = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(2))
    assert bool((best(errors(kept, kept, torch.zeros(2, 3, 40)), 0) < -20).all())


def test_beside_sinks_a_logit_must_be_worth_it() -> None:
    """One that takes all of the error away stays, one that takes a fifth of it goes."""
    generator = torch.Generator().manual_seed(4)
    kept, noise = torch.randn(2, 2, 1, 500, 8, generator=generator)
    lse = torch.zeros(2, 1, 500)
    for noisy, stays in ((0.0, True), (1.0, False)):
        whole = 0.5 * kept + noisy * noise
        logits = best(errors(whole, kept, lse), 4)
        assert (float(logits.abs().max()) < 1.0) == stays
        assert float(best(errors(whole, kept, lse), 0).abs().max()) < 1.0


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
