"""Latent attention in transformers' own classes: the same numbers as by hand, with a cache and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_heads import WIDTH, angles, make_heads
from latent_layers import latent_moments, planted
from stored_latent import latent_heads

from rehead.errors import UnsupportedError
from rehead.models.heads import Heads
from rehead.models.modeling.modeling_rehead_cache import returned_cache
from rehead.variants.latent.bias import constant_direction, without_biases
from rehead.variants.latent.export import HOSTS, latent_config, layer_tensors, stream_scale
from rehead.variants.latent.solve import solve

LAYERS, VOCABULARY, FFN, EPS = 2, 61, 40, 1e-5
SOURCE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": EPS,
}


def square_heads(bias: bool = False, **more) -> Heads:
    """Heads that write as wide as they read."""
    heads = make_heads(4, bias=bias, **more)
    g = torch.Generator().manual_seed(9)
    o = torch.randn(WIDTH, 8, heads.head_dim, generator=g, dtype=torch.float64) * 0.05
    return replace(heads, q=heads.q * 0.3, k=heads.k * 0.3, v=heads.v * 0.3, o=o)


def converted(heads: Heads, pairs: int, rank: int):
    x = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return solve(heads, latent_moments(heads, x), angles(heads), torch.arange(pairs), rank).latent


def rms(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()


def source_weights(tied: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) * 0.2  # noqa: E731
    weights = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH), "model.norm.weight": 1 + draw(WIDTH)}
    if not tied:
        weights["lm_head.weight"] = draw(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "mlp.gate_proj.weight": draw(FFN, WIDTH),
            prefix + "mlp.up_proj.weight": draw(FFN, WIDTH),
            prefix + "mlp.down_proj.weight": draw(WIDTH, FFN),
            prefix + "input_layernorm.weight": 1 + draw(WIDTH),
            prefix + "post_attention_layernorm.weight": 1 + draw(WIDTH),
        }
    return weights


def by_hand(latents, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the live form: the source's own eps and scales, no norm on the latent."""
    h = weights["model.embed_tokens.weight"][tokens]
    for layer, latent in enumerate(latents):
        get = lambda name, layer=layer: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: E731
        h = h + latent.attend(rms(h, get("input_layernorm"), EPS))
        x = rms(h, get("post_attention_layernorm"), EPS)
        gate = torch.nn.functional.silu(x @ get("mlp.gate_proj").T)
        h = h + (gate * (x @ get("mlp.up_proj").T)) @ get("mlp.down_proj").T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms(h, weights["model.norm.weight"], EPS) @ head.T


def stock(host: str, latents, weights, tied: bool, interleaved: bool, dtype=torch.float32):
    """The host's own class with the exported tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = latent_config(SOURCE | {"tie_word_embeddings": tied}, host, latents[0], interleaved)
    scale, full = stream_scale(EPS, tied), {}
    for name, weight in weights.items():
        writes = "embed_tokens" in name or "down_proj" in name
        factor = scale.writers if writes else scale.final_norm if name == "model.norm.weight" else 1.0
        full[name] = (weight * factor).to(dtype)
    for layer, latent in enumerate(latents):
        prefix = f"model.layers.{layer}.self_attn."
        full |= layer_tensors(latent, prefix, dtype, interleaved, scale.writers)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(full, strict=False)
    assert not unexpected
    assert not missing or (tied and missing == ["lm_head.weight"])
    return model.to(dtype), full, config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_the_stock_class_computes_what_the_live_form_does(host, interleaved, tied) -> None:
    latents = [converted(square_heads(seed=seed), 3, 10) for seed in range(LAYERS)]
    weights = source_weights(tied)
    model, full, config = stock(host, latents, weights, tied, interleaved)
    tokens = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        logits = model(tokens).logits.double()
    wanted = by_hand(latents, weights, tokens)
    assert float((logits - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))
    # The way back, from stored tensors to the live form.
    prefix = "model.layers.0.self_attn."
    scale = stream_scale(EPS, tied).writers
    back = latent_heads(full, prefix, config, latents[0].frequencies, scale)
    x = torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert torch.allclose(back.attend(x), latents[0].attend(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_generation_with_a_cache_is_that_without(host) -> None:
    latents = [converted(square_heads(seed=seed), 2, 8) for seed in range(LAYERS)]
    model, _, _ = stock(host, latents, source_weights(False), False, True)
    tokens = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(8))
    options = dict(
        max_new_tokens=12, min_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    with_cache, without = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    for a, b in zip(with_cache.scores, without.scores):
        assert torch.allclose(a, b, atol=1e-5)
    cache = returned_cache(model(tokens, use_cache=True))
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == LAYERS * 12 * latents[0].numbers_per_token


def test_bfloat16_loses_what_bfloat16_loses() -> None:
    """The lane adds nothing to the rounding of the weights: as good as float32 arithmetic on rounded weights."""
    latents = [converted(square_heads(seed=seed), 4, 16) for seed in range(LAYERS)]
    weights = source_weights(False)
    tokens = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(8))
    wanted = by_hand(latents, weights, tokens)
    gap = lambda logits: float((logits.double() - wanted).norm() / wanted.norm())  # noqa: E731
    rounded = [latent.to(torch.bfloat16).to(torch.float64) for latent in latents]
    plain = gap(by_hand(rounded, {name: w.bfloat16().double() for name, w in weights.items()}, tokens))
    model, _, _ = stock("deepseek_v3", latents, weights, False, True, torch.bfloat16)
    with torch.no_grad():
        assert gap(model(tokens).logits) < 4 * plain


@pytest.mark.parametrize("names", ["qkv", "kv", "v"])
@pytest.mark.parametrize("host", HOSTS)
def test_biases_are_exact_in_the_stock_class(host, names) -> None:
    """As Qwen2 has them: those of queries cost a second matrix."""
    heads = square_heads(bias=True)
    heads = replace(heads, **{f"{name}_bias": None for name in "qkv" if name not in names})
    latents = [converted(heads, 4, 16)] * LAYERS
    weights = source_weights(False)
    model, full, config = stock(host, latents, weights, False, True)
    assert config["attention_bias"]
    assert (config["q_lora_rank"] is not None) == ("q" in names)
    tokens = torch.randint(3, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(8))
    wanted = by_hand(latents, weights, tokens)
    with torch.no_grad():
        assert float((model(tokens).logits.double() - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    back = latent_heads(
        full, "model.layers.0.self_attn.", config, latents[0].frequencies, stream_scale(EPS, False).writers
    )
    x = torch.randn(1, 20, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert torch.allclose(back.attend(x), latents[0].attend(x), rtol=1e-4, atol=1e-5)


def test_a_bias_becomes_weights_where_the_inputs_hold_a_constant_and_says_its_error_where_not() -> None:
    heads = planted("half", 8, 6, bias=True)
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = lambda x: (lambda y: y.T @ y / len(y))(torch.cat([x, torch.ones(len(x), 1)], -1))  # noqa: E731
    _, far = without_biases(heads, moment(x))
    assert 0.5 < far <= 1
    x[:, 5] = 2.0
    u, error = constant_direction(moment(x))
    assert error < 1e-6
    assert torch.allclose(x @ u, torch.ones(200).double(), atol=1e-6)
    folded, error = without_biases(heads, moment(x))
    assert error < 1e-6
    assert folded.q_bias is None
    assert torch.allclose(
        torch.einsum("hdn,sn->shd", folded.q, x), torch.einsum("hdn,sn->shd", heads.q, x) + heads.q_bias, atol=1e-6
    )
    assert without_biases(folded, moment(x)) == (folded, 0.0)


@pytest.mark.parametrize(("change", "word"), [({"mlp_bias": True}, "biases"), ({"sliding_window": 64}, "windows")])
def test_what_a_host_cannot_hold_is_refused(change, word) -> None:
    with pytest.raises(UnsupportedError, match=word):
        latent_config(SOURCE | change, "youtu", converted(square_heads(), 4, 16))


def test_hosts_and_norms_that_are_unknown_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="deepseek_v3"):
        latent_config(SOURCE, "deepseek_v4", converted(square_heads(), 4, 16))
    with pytest.raises(UnsupportedError, match="above 0"):
        stream_scale(0.0, tied=False)
