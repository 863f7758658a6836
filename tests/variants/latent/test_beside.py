"""Latents in some layers beside windows and fewer heads in others: one checkpoint, in Rehead's modelling file."""

import json

import pytest
import tiny
import torch
from tiny import loaded, logits

from rehead.convert import convert, inspect, verify
from rehead.convert.budget.library import Option, library
from rehead.convert.budget.mix import Mix
from rehead.convert.budget.prepare import solve_forms
from rehead.convert.variants import variant_rewrite
from rehead.data.calibration import load_calibration
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import open_model
from rehead.variants.contract import saved_variant

LAYERS = 5
TEXT = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 64}
FORMS = [
    "latent:rank=40,rope_dims=8,layers=0",
    "latent:rank=24,rope_dims=8,layers=3",
    "window:size=8,sinks=2,layers=2",
]
FEWER = "uneven:num_key_value_heads=3,layers=1"


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def mixed(request, tmp_path_factory):
    """(source, the same with a form of its own in every layer but the last)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny.save_tiny(request.param, folder / "source", num_hidden_layers=LAYERS)
    forms = FORMS if request.param == "qwen3" else [FEWER, *FORMS]
    convert(source, folder / "out", variants=forms, refit=True, fit=2, **TEXT)
    return source, folder / "out"


def test_it_verifies_and_caches_what_its_layers_say(mixed):
    source, out = mixed
    report = verify(out, str(source))
    assert report.cache_error < 1e-5
    assert report.cache_bytes["measured"] == report.cache_bytes["layout"]
    assert report.against_source["mean_kl"] < 0.05
    config = json.loads((out / "config.json").read_text())
    assert [sizes and sizes["rank"] for sizes in config["layer_latents"]] == [40, None, None, 24, None]
    assert config["layer_windows"] == [None, None, 8, None, None]


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generation_with_a_cache_is_that_without(mixed, more):
    live = loaded(mixed[1])
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    told = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        live.generate(ids, **told, **more),
        live.generate(ids, **told, use_cache=False, **({} if "cache_implementation" in more else more)),
    )


def test_padding_changes_nothing(mixed):
    live = loaded(mixed[1])
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    told = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    padded = live.generate(ids, attention_mask=mask, **told)[0, 20:]
    assert torch.equal(padded, live.generate(ids[:1, 5:], attention_mask=mask[:1, 5:], **told)[0, 15:])


def test_a_budget_measures_what_is_written(tmp_path):
    """Closed forms on the live model compute what the checkpoint does."""
    source = tiny.save_tiny("llama", tmp_path / "source", num_hidden_layers=LAYERS)
    convert(source, tmp_path / "out", variants=FORMS, **TEXT)
    model = open_model(source)
    options = library(model, 64)
    choice = {}
    for text in FORMS:
        variant, wanted = saved_variant(text)
        (layer,) = wanted.indices(LAYERS) if hasattr(wanted, "indices") else [int(wanted.layers)]
        choice[layer] = Option(text, variant.layout(options.layers[layer][0].layout, wanted), variant, wanted)
        options.layers[layer] = [options.layers[layer][0], choice[layer]]
    options.layers[1], options.layers[4] = options.layers[1][:1], options.layers[4][:1]
    text = load_calibration(["random"], model.source, tiny.VOCAB, 2048, (64,), 0)
    live = loaded(source)
    whole = {
        layer: Option(o.name, o.layout, o.variant, o.options.but(layers="all")) for layer, o in choice.items()
    }  # as a library has them
    options.layers.update({layer: [options.layers[layer][0], option] for layer, option in whole.items()})
    with Mix(live, model, list(whole.values())) as mix:
        solve_forms(mix, model, options, text)
        with mix.on(whole):
            together = logits(live)
    assert torch.allclose(together, logits(loaded(tmp_path / "out")), atol=1e-3)
    assert (together - logits(live)).abs().max() > 1e-2


def test_layers_are_changed_once(tmp_path):
    source = tiny.save_tiny("llama", tmp_path / "source")
    twice = ["uneven:num_key_value_heads=1,layers=1", "latent:rank=40,rope_dims=8,layers=1"]
    with pytest.raises(UnsupportedError, match="cannot be calibrated after"):
        convert(source, tmp_path / "out", variants=twice, **TEXT)


@pytest.mark.parametrize(
    ("kind", "forms", "error", "says"),
    [
        ("gpt_neox", ["latent:rank=8,rope_dims=4,layers=0"], UnsupportedError, "latents are for"),
        ("llama", ["latent:rank=8,layers=0"], UsageError, "its sizes must be said"),
        ("llama", ["uneven:num_key_value_heads=1", "uneven:num_key_value_heads=2,layers=1"], UsageError, "given twice"),
    ],
)
def test_what_cannot_be(tmp_path, kind, forms, error, says):
    source = tiny.save_tiny(kind, tmp_path / "source")
    with pytest.raises(error, match=says):
        convert(source, tmp_path / "out", variants=forms, **TEXT)


FIRST = {
    "parallel": {"block": "parallel"},
    "windows": {"window": 8, "sinks": 2},
    "one window": {"window": 8, "sinks": 2, "layers": "1"},
    "logits": {"window": 8, "sink_logit": True, "host": "rehead_window"},
}


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        # What a second conversion would leave out of what the first one made.
        ("parallel", {"latent": 24, "rope_dims": 4}, "no parallel blocks"),
        ("windows", {"latent": 24, "rope_dims": 4}, "its attention has windows"),
        ("logits", {"variants": ["latent:rank=24,rope_dims=4,layers=0"]}, "layers.0.self_attn.sinks: latents have no"),
        ("one window", {"window": 4, "layers": "0"}, "share 2 sink tokens .give --sinks 2"),
        ("windows", {"block": "parallel"}, "has no other blocks"),
        # Heads of several sizes come last, so that nothing has to read them.
        (None, {"variants": ["uneven:num_key_value_heads=2,layers=1"], "window": 8, "sinks": 2}, "in a second run"),
        (None, {"variants": ["uneven:num_key_value_heads=2,layers=1"], "context": 512}, "in a second run"),
    ],
)
def test_what_a_conversion_made_is_not_lost_in_the_next(tmp_path, first, second, says):
    source = tiny.save_tiny("llama", tmp_path / "source", attention_bias=False)
    if first is not None:
        source = convert(source, tmp_path / "first", **FIRST[first], **TEXT | {"calibration_length": 32}).out
    with pytest.raises(UnsupportedError, match=says):
        convert(source, tmp_path / "out", **second, **TEXT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["latent:rank=24,rope_dims=8,layers=1", "uneven:num_key_value_heads=3,layers=1"])
def test_windows_without_sinks_stand_beside_a_form_too(tmp_path, form):
    """Though another class would hold the windows alone."""
    source = tiny.save_tiny("llama", tmp_path / "source", attention_bias=False)
    convert(source, tmp_path / "out", variants=[form], window=8, layers="0", **TEXT)
    assert verify(tmp_path / "out", str(source)).cache_error < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_windows"] == [8, None]


def test_it_is_not_converted_again(mixed):
    with pytest.raises(UnsupportedError, match="forms of their own"):
        convert(mixed[1], mixed[1].parent / "again", num_key_value_heads=1)
    with pytest.raises(UnsupportedError, match="forms of their own"):
        inspect(mixed[1])


def test_a_form_of_some_layers_leaves_the_others_alone(tmp_path):
    model = open_model(tiny.save_tiny("llama", tmp_path / "source"))
    variant, wanted = saved_variant("latent:rank=8,rope_dims=4,layers=1")
    rewrite = variant_rewrite(model, variant, wanted)
    assert {derived.layer for derived in rewrite.tensors.values() if derived.layer is not None} == {1}
