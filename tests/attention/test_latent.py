"""Latent attention over the latents: generation as with expanded heads, and a cache of the latents alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rehead.attention import latent
from rehead.benchmarks.tiny import tiny_model
from rehead.models.cache_layouts import config_layouts
from rehead.models.layout import cache_bytes
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model

TOKENS = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 40, dtype=torch.long)
LEFT[0, :9] = 0
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "contrasting drafts": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module", params=["deepseek_v3", "youtu"])
def model(request) -> Any:
    return tiny_model(request.param).eval()


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the calls that expand the heads."""
    kind, rows = type(model.model.layers[0].self_attn), []
    shipped = kind.expand_kv

    def expand_kv(self: Any, latents: torch.Tensor, shared: torch.Tensor) -> Any:
        rows.append(latents.shape[2])
        return shipped(self, latents, shared)

    monkeypatch.setattr(kind, "expand_kv", expand_kv)
    return rows


@pytest.mark.parametrize("setting", SETTINGS)
def test_generation_is_that_of_expanded_heads(model: Any, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = slice(1) if "prompt_lookup_num_tokens" in SETTINGS[setting] else slice(2)
    arguments = {"attention_mask": LEFT[rows], "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    arguments |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True} | SETTINGS[setting]
    wanted = model.generate(TOKENS[rows], **arguments)
    expanded = watched(model, monkeypatch)
    monkeypatch.setattr(latent, "is_absorbed", lambda module, query, *_: query.shape[2] < 16)
    with patch_model(model, "tiled"):
        result = model.generate(TOKENS[rows], **arguments)
    assert torch.equal(result.sequences, wanted.sequences)
    for mine, theirs in zip(result.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert len(expanded) == len(model.model.layers)  # the prompt alone


def test_the_cache_holds_latents_and_as_many_bytes_as_planned(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), patch_model(model, "tiled"):
        model(TOKENS, **cache_argument(cache))
        model(TOKENS[:, :1], **cache_argument(cache))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == len(TOKENS) * cache_bytes(config_layouts(model.config, itemsize=4), TOKENS.shape[1] + 1)


@torch.no_grad()
def test_a_cache_filled_under_the_patch_goes_on_without_it(model: Any) -> None:
    wanted = model(TOKENS).logits[:, -1]
    cache = DynamicCache(config=model.config)
    with patch_model(model, "tiled"):
        model(TOKENS[:, :-1], **cache_argument(cache))
    torch.testing.assert_close(model(TOKENS[:, -1:], **cache_argument(cache)).logits[:, -1], wanted, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["window", "temperature"])
def test_variants_stack_on_latents_as_on_heads(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"window": {"size": 9, "sinks": 2}, "temperature": {"start": 1.3}}[name]
    with patch_model(model, name, **options):
        results = []
        for absorbed in (False, True):
            monkeypatch.setattr(latent, "is_absorbed", lambda *_, absorbed=absorbed: absorbed)
            results.append(model(TOKENS, attention_mask=LEFT).logits[LEFT.bool()])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_another_attention_for_a_while_gets_expanded_heads(model: Any) -> None:
    wanted = model(TOKENS).logits
    with patch_model(model, "tiled"):
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(TOKENS).logits, wanted, atol=1e-4, rtol=0)


def test_gradients_and_watched_projections_expand_the_heads(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expanded = watched(model, monkeypatch)
    attention = model.model.layers[0].self_attn
    with patch_model(model, "tiled"):
        model(TOKENS[:, :1])
        assert len(expanded) == len(model.model.layers)
        with torch.no_grad():
            model(TOKENS[:, :1])
            assert len(expanded) == len(model.model.layers)
            handle = attention.kv_b_proj.register_forward_hook(lambda *_: None)
            model(TOKENS[:, :1])
            handle.remove()
    assert len(expanded) == len(model.model.layers) + 1


def test_few_queries_are_absorbed_and_long_prompts_are_not() -> None:
    """At the sizes of DeepSeek V3 a prompt of some 170 tokens takes as much arithmetic either way."""
    module = tiny_model("deepseek_v3").eval().model.layers[0].self_attn
    module.qk_nope_head_dim = module.v_head_dim = 128
    latents, shared = torch.empty(1, 1, 8, 512), torch.empty(1, 1, 8, 64)
    with torch.no_grad():
        for rows, expected in ((1, True), (170, True), (171, False)):
            assert latent.is_absorbed(module, torch.empty(1, 4, rows, 192), latents, shared) is expected
