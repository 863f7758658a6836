"""A pass that takes more sequences than a step of the fit: masks of windows fit both."""

import tiny

from rehead.convert import convert
from rehead.healing import run


def test_masks_are_cut_to_the_sequences_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_BATCH_TOKENS", {"cpu": 16384})  # as on a GPU, where four times a step's tokens pass
    source = tiny.save_tiny("llama", tmp_path / "source", attention_bias=False, head_dim=8)
    made = convert(
        source, tmp_path / "out", window=8, sink_logit=True, layers="1", refit=True, fit=2, calibration=["random"],
        calibration_tokens=16384, calibration_length=64,
    )  # fmt: skip
    assert made.plan.raw_config["model_type"] == "granite_swa"
    assert made.layers[1]["fit_loss"] < 1
