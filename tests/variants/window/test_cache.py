"""Caches that really shrink: generation from them is that from a cache that keeps everything."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from rehead.benchmarks.tiny import tiny_model
from rehead.convert import convert
from rehead.errors import UnsupportedError, UsageError
from rehead.models.layout import LayerLayout
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.modeling.modeling_rehead_ring import StaticWindowLayer, WindowLayer
from rehead.patches import patch_model

TOKENS = torch.randint(8, 120, (3, 40), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(TOKENS)
PADDED[0, :9] = 0
PADDED[1, :23] = 0
PROMPTS = torch.ones(3, 20, dtype=torch.int64)
PROMPTS[0, :3] = 0
PROMPTS[1, :17] = 0
STEPS = (0, 17), (17, 18), (18, 19), (19, 26), (26, 27), (27, 40)


@pytest.fixture
def model():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture(params=["live", "saved"])
def windowed(request, model, tmp_path):
    """Makes a model with windows in some of its layers: patched, or converted, whose caches are to be the same."""
    patches = []

    def make(size=6, sinks=2, layers="all"):
        if request.param == "live":
            patches.append(patch_model(model, "window", size=size, sinks=sinks, layers=layers).apply())
            return model
        model.save_pretrained(tmp_path / "source")
        named = layers if layers == "all" else ",".join(map(str, layers))
        convert(tmp_path / "source", tmp_path / "out", window=size, sinks=sinks, layers=named, host="rehead_window")
        return tiny.loaded(tmp_path / "out")

    make.saved = request.param == "saved"
    yield make
    for patch in patches:
        patch.revert()


def stepped(model, cache, mask=PADDED):
    rows = []
    with torch.no_grad():
        for start, stop in STEPS:
            out = model(TOKENS[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **cache_argument(cache))
            rows.append(out.logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize(("size", "sinks"), [(6, 0), (6, 2), (1, 1), (12, 7), (2, 3), (39, 1)])
@pytest.mark.parametrize("layers", ["all", [1], [0, 2]])
@pytest.mark.parametrize("static", [False, True])
def test_steps_from_a_ring_are_one_pass(windowed, size, sinks, layers, static):
    if sinks >= size and windowed.saved:
        pytest.skip("a checkpoint keeps fewer sinks than a window has tokens")
    model = windowed(size, sinks, layers)
    with torch.no_grad():
        whole = model(TOKENS, attention_mask=PADDED, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    got = stepped(model, cache)
    keep = PADDED.bool()
    torch.testing.assert_close(got[keep], whole[keep], atol=2e-4, rtol=1e-4)
    kept = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    assert len(kept) == (3 if layers == "all" else len(layers))
    for layer in kept:
        assert layer.keys.shape[2] == min(40, size - 1 + sinks)
        assert isinstance(layer, StaticWindowLayer) == static
        assert layer.get_seq_length() == 40


def test_bytes_are_those_of_the_layout(windowed):
    model = windowed(6, 2, [1])
    cache = DynamicCache(config=model.config)
    stepped(model, cache)
    for index, layer in enumerate(cache.layers):
        heads, size = layer.keys.shape[1], layer.keys.shape[3]
        layout = LayerLayout(index, 4, heads, size, size, *((6, 2) if index == 1 else (None, 0)), itemsize=4)
        assert layer.keys.nbytes + layer.values.nbytes == 3 * layout.cache_bytes(40)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "static", "sampled"],
)
def test_generation_is_that_without_a_cache(windowed, options):
    model = windowed(6, 2)
    config = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None, **options}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        more = {name: value for name, value in config.items() if use_cache or name != "cache_implementation"}
        given = GenerationConfig(**more, use_cache=use_cache)
        results.append(model.generate(TOKENS[:, :20], attention_mask=PROMPTS, generation_config=given))
    assert torch.equal(*results)


def test_an_assistant_drafts_and_the_ring_is_cropped(windowed, model):
    target = windowed(6, 2)
    row = TOKENS[2:, :20]
    alone = target.generate(row, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    helped = target.generate(
        row, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, prompt_lookup_num_tokens=4
    )
    assert torch.equal(alone, helped)


def test_what_was_dropped_cannot_come_back(windowed):
    model = windowed(6, 2)
    cache = DynamicCache(config=model.config)
    stepped(model, cache)
    with pytest.raises(RuntimeError, match="cannot be cropped; call activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    with torch.no_grad():
        more = torch.cat([PADDED, torch.ones(3, 4, dtype=torch.int64)], 1)
        model(TOKENS[:, :4], attention_mask=more, **cache_argument(cache))
        cache.crop(-4)
        again = model(TOKENS[:, :1], attention_mask=more[:, :41], **cache_argument(cache)).logits
        fresh = DynamicCache(config=model.config)
        stepped(model, fresh)
        torch.testing.assert_close(
            again, model(TOKENS[:, :1], attention_mask=more[:, :41], **cache_argument(fresh)).logits
        )


def test_a_full_cache_is_taken_over(model):
    with torch.no_grad():
        cache = returned_cache(model(TOKENS[:, :30], use_cache=True))
        with patch_model(model, "window", size=6, sinks=2):
            model(TOKENS[:, 30:31], **cache_argument(cache))
            assert all(layer.keys.shape[2] == 7 for layer in cache.layers)
        assert all("rehead_ring" not in module.__dict__ for module in model.modules())


def test_a_layer_that_is_switched_off_wants_a_new_cache(model):
    cache = DynamicCache(config=model.config)
    with patch_model(model, "window", size=6) as patch:
        stepped(model, cache)
        with patch.only([0]), pytest.raises(UsageError, match="start with a new cache"), torch.no_grad():
            model(TOKENS[:, :1], **cache_argument(cache))


def test_masks_of_values_are_refused(model):
    with patch_model(model, "window", size=6, sinks=1):
        cache = DynamicCache(config=model.config)
        stepped(model, cache)
        mask = torch.zeros(3, 1, 1, 41)
        with pytest.raises(UnsupportedError), torch.no_grad():
            model(TOKENS[:, :1], attention_mask=mask, **cache_argument(cache))


def test_tiled_attention_sees_a_saved_window(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", window=6, sinks=2)
    saved = tiny.loaded(tmp_path / "out")
    before = tiny.logits(saved, TOKENS)
    with patch_model(saved, "tiled"):
        torch.testing.assert_close(tiny.logits(saved, TOKENS), before, atol=1e-4, rtol=1e-4)
        cache = DynamicCache(config=saved.config)
        torch.testing.assert_close(stepped(saved, cache, torch.ones_like(TOKENS)), before, atol=1e-4, rtol=1e-4)
