"""Windows in checkpoints: in the class's own config, in one that stands in for it, or in a modelling file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import loaded, logits

from rehead.convert import convert, plan, verify
from rehead.errors import UnsupportedError, UsageError
from rehead.patches import patch_model
from rehead.variants.window.classes import BY_LAYER, WHOLE

IDS = torch.arange(2 * 40).view(2, 40) * 7 % tiny.VOCAB
NO_WINDOW = {"sliding_window": None}
CALIBRATION = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}


def full(model_type: str) -> dict:
    """A tiny config without windows."""
    if model_type in WHOLE:
        return NO_WINDOW
    return {"layer_types": ["full_attention"] * tiny.LAYERS}


@pytest.mark.parametrize("model_type", [*BY_LAYER, *WHOLE])
def test_a_class_of_its_own_computes_what_the_patch_does(model_type: str, tmp_path: Path) -> None:
    if not tiny.available(model_type):
        pytest.skip("not in this transformers")
    layers = "all" if model_type in WHOLE else "1"
    source = tiny.save_tiny(model_type, tmp_path / "source", **full(model_type))
    convert(source, tmp_path / "out", window=8, layers=layers)
    live, saved = loaded(source), loaded(tmp_path / "out")
    assert saved.config.model_type == model_type
    before = logits(live, IDS)
    with patch_model(live, "window", size=8, layers=layers):
        ours = logits(live, IDS)
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, logits(saved, IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["llama-plain", "llama", "mistral", "ministral", "qwen2"])
@pytest.mark.parametrize("host", ["ministral", "qwen2", "cwm", "smollm3", "granite_swa", "rehead_window"])
def test_hosts_compute_the_same_before_their_windows(source: str, host: str, tmp_path: Path) -> None:
    model_type, bias = source.removesuffix("-plain"), not source.endswith("-plain")
    options = {"layer_types": ["full_attention"] * 2} if model_type == "ministral" else {}
    options |= NO_WINDOW if model_type == "mistral" else {}
    folder = tiny.save_tiny(model_type, tmp_path / "source", attention_bias=bias, **options)
    biased = {"llama": bias, "qwen2": True}.get(model_type, False)
    refused = (biased and host in ("ministral", "cwm")) or (model_type, host, biased) == ("llama", "qwen2", True)
    if host == model_type or (model_type, host) == ("ministral", "rehead_window") or refused:
        with pytest.raises(UnsupportedError):
            plan(folder, host=host)
        return
    convert(folder, tmp_path / "out", host=host, dtype="float32")
    saved = loaded(tmp_path / "out")
    assert saved.config.model_type.startswith(host)
    assert (logits(saved, IDS) - logits(loaded(folder), IDS)).abs().max() < 5e-6
    assert verify(tmp_path / "out", str(folder)).against_source


@pytest.mark.parametrize(
    ("model", "options", "config", "wanted"),
    [
        ("llama", {"window": 5}, {"attention_bias": False}, "ministral"),
        ("llama", {"window": 5}, {}, "smollm3"),
        ("llama", {"window": 5, "sink_logit": True}, {}, "granite_swa"),
        ("llama", {"window": 5, "sinks": 2}, {}, "rehead_window_llama"),
        ("llama", {"window": 5, "host": "qwen2"}, {"attention_bias": False}, "qwen2"),
        ("mistral", {"window": 5}, NO_WINDOW, "mistral"),
        ("mistral", {"window": 5, "layers": "1"}, NO_WINDOW, "ministral"),
        ("qwen3", {"window": 5, "layers": "1"}, {}, "qwen3"),
        ("qwen3", {"window": 5, "sinks": 1, "sink_logit": True}, NO_WINDOW, "rehead_window_qwen3"),
    ],
)
def test_the_nearest_class_that_holds_it(model: str, options: dict, config: dict, wanted: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(model, tmp_path / "source", **config)
    extra = CALIBRATION if options.get("sink_logit") else {}
    facts = plan(source, **options, **extra).as_json()
    assert facts.get("host", {"after": model})["after"] == wanted
    assert not facts["exact"]
    assert facts["windows"] == [5]


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        ("llama", {"window": 0}, UsageError, "1 or more"),
        ("llama", {"window": -4}, UsageError, "--window"),
        ("llama", {"window": 4, "sinks": 4}, UsageError, "--sinks 4: must be fewer than the window of 4"),
        ("llama", {"window": 128}, UsageError, "--window 128: hides nothing of this model, which has 128 positions"),
        ("llama", {"sinks": 4, "host": "granite_swa"}, UsageError, "--sinks: says nothing without --window"),
        ("llama", {"window": 4, "layers": "7"}, UsageError, "layer 7 does not exist"),
        ("llama", {"window": 9, "sink_logit": True, **CALIBRATION}, UsageError, "give --calibration-length 36 or more"),
        ("llama", {"window": 4, "sinks": 1, "host": "granite_swa"}, UnsupportedError, "it has no sink tokens"),
        ("llama", {"window": 4, "sink_logit": True, "host": "smollm3", **CALIBRATION}, UnsupportedError,
         "it has no sink logit"),
        ("gemma2", {"window": 5, "layers": "1"}, UnsupportedError, "share one window, which would be 5 and 8"),
        ("gemma3_text", {"window": 8}, UnsupportedError, "its config has no window"),
        ("gpt2", {"window": 8}, UnsupportedError, "Rehead has no modelling file for it"),
        ("llama", {"window": 8, "latent": 8}, UsageError, "--window: does not go together with latent attention"),
        ("llama", {"window": 8, "block": "parallel", "layers": "1"}, UsageError, "--layers: names layers of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(
    model: str, options: dict, error: type[Exception], said: str, tmp_path: Path
) -> None:
    source = tiny.save_tiny(model, tmp_path / "source")
    with pytest.raises(error, match=said) as caught:
        plan(source, **options)
    assert "\n" not in str(caught.value)


def test_the_logit_is_fitted_and_said(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    done = convert(source, tmp_path / "out", window=5, layers="1", sink_logit=True, **CALIBRATION)
    assert list(done.layers) == [1]
    assert len(done.layers[1]["sink_logits"]) == tiny.HEADS
    saved = loaded(tmp_path / "out")
    first, second = (layer.self_attn.sinks for layer in saved.model.layers)
    assert bool((first == -1e4).all())
    assert bool((second > -30).all())
    convert(source, tmp_path / "bare", window=5, layers="1", host="granite_swa")
    manifest = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert manifest["host"]["after"] == "granite_swa"
    assert manifest["variants"]["window"]["options"] == {"layers": "1", "size": 5, "sinks": 0, "sink_logit": True}
    kl = [verify(tmp_path / name, str(source)).against_source["mean_kl"] for name in ("out", "bare")]
    assert kl[0] < kl[1]


def test_a_fit_moves_the_logit_too(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    options = {"window": 5, "sink_logit": True, **CALIBRATION}
    convert(source, tmp_path / "closed", **options)
    convert(source, tmp_path / "fitted", refit=True, fit=20, **options)
    closed, fitted = (loaded(tmp_path / name) for name in ("closed", "fitted"))
    for a, b in zip(closed.model.layers, fitted.model.layers):
        assert not torch.equal(a.self_attn.sinks, b.self_attn.sinks)
    kl = [verify(tmp_path / name, str(source)).against_source["mean_kl"] for name in ("fitted", "closed")]
    assert kl[0] < kl[1]


def test_a_modelling_file_trains_and_saves(tmp_path: Path) -> None:
    """Its logits have gradients, and a copy that transformers writes is the same model."""
    source = tiny.save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "out", window=5, sink_logit=True, host="rehead_window", **CALIBRATION)
    model = loaded(tmp_path / "out")
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(float(layer.self_attn.sinks.grad.abs().sum()) > 0 for layer in model.model.layers)
    model.eval().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))
