"""GPT-2 under GPT-BigCode's class: the same logits, or a refusal."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rehead.convert.families import FAMILIES
from rehead.convert.families.layouts import merge, split
from rehead.convert.rehost import rehost
from rehead.errors import UnsupportedError

HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny")
IDS = torch.arange(24).view(2, 12) * 7 % tiny.VOCAB


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def carry_out(raw: dict, tensors: dict[str, torch.Tensor], kv: int):
    """What a plan does with a rehost, in memory: the new class with the new tensors, loaded strictly."""
    plan = rehost(raw, tensors, kv)
    config = AutoConfig.for_model(**raw)
    out: dict[str, torch.Tensor] = {}
    for layer in range(config.n_layer):
        heads = split(plan.source, config, layer, tensors)
        if kv != heads.num_kv_heads:
            step = heads.num_kv_heads // kv
            heads = replace(heads, k=heads.k[::step], v=heads.v[::step])
            heads = replace(heads, k_bias=heads.k_bias[::step], v_bias=heads.v_bias[::step])
        out |= merge(plan.target, layer, heads, tensors)
    written = {name for name, place in plan.tensors.items() if place.how == "layer"}
    assert set(out) == written
    for name, place in plan.tensors.items():
        if place.how != "layer":
            out[name] = tensors[place.source] if place.how == "copy" else tensors[place.source].T.contiguous()
    assert set(plan.dropped) | {place.source for place in plan.tensors.values()} == set(tensors)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plan.config), attn_implementation="eager")
    missing, unexpected = model.load_state_dict(out, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"n_inner": None, "tie_word_embeddings": False},
    ],
)
def test_all_heads_give_the_same_logits(changes: dict) -> None:
    source = tiny.tiny_model("gpt2", **changes)
    raw = source.config.to_dict()
    tensors = dict(source.state_dict()) if changes.get("tie_word_embeddings") is False else state_of(source)
    target = carry_out(raw, tensors, tiny.HEADS)
    assert target.config.model_type == "gpt_bigcode"
    torch.testing.assert_close(logits(target), logits(source), atol=1e-5, rtol=1e-5)


def test_equal_heads_give_the_same_logits_as_one() -> None:
    source = tiny.tiny_model("gpt2")
    with torch.no_grad():
        for layer in range(tiny.LAYERS):
            state = dict(source.state_dict())
            heads = split(FAMILIES["gpt2"], source.config, layer, state)
            same = {name: getattr(heads, name)[:1].expand_as(getattr(heads, name)) for name in "kv"}
            same |= {f"{name}_bias": getattr(heads, f"{name}_bias")[:1].expand(tiny.HEADS, -1) for name in "kv"}
            source.load_state_dict(state | merge(FAMILIES["gpt2"], layer, replace(heads, **same), state))
    target = carry_out(source.config.to_dict(), state_of(source), 1)
    assert target.config.multi_query
    torch.testing.assert_close(logits(target), logits(source), atol=1e-5, rtol=1e-5)


def test_hub_names_and_stale_buffers() -> None:
    """The first GPT-2 checkpoints have no ``transformer.`` and carry their causal masks."""
    source = tiny.tiny_model("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in state_of(source).items()}
    for layer in range(tiny.LAYERS):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    raw = source.config.to_dict() | {"n_ctx": 128}
    assert len(rehost(raw, tensors, tiny.HEADS).dropped) == 2 * tiny.LAYERS
    torch.testing.assert_close(logits(carry_out(raw, tensors, tiny.HEADS)), logits(source), atol=1e-5, rtol=1e-5)


def test_defaults_that_differ_are_written_out() -> None:
    plan = rehost({"model_type": "gpt2"}, {}, 1)
    assert plan.config["activation_function"] == "gelu_new"
    assert plan.config["n_positions"] == 1024


@pytest.mark.parametrize(
    ("changes", "kv", "says"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, 1, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, 1, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, 1, "add_cross_attention"),
        ({"activation_function": "gelu_knew"}, 1, "gelu_knew"),
        ({}, 2, "--kv-heads 1"),
    ],
)
def test_refuses_what_would_not_be_exact(changes: dict, kv: int, says: str) -> None:
    raw = tiny.tiny_config("gpt2").to_dict() | changes
    with pytest.raises(UnsupportedError, match=says) as error:
        rehost(raw, {}, kv)
    assert "\n" not in str(error.value)


def test_refuses_tensors_without_a_place_and_other_types() -> None:
    raw = tiny.tiny_config("gpt2").to_dict()
    with pytest.raises(UnsupportedError, match=r"score\.weight"):
        rehost(raw, {"score.weight": torch.zeros(2, 64)}, 1)
    with pytest.raises(UnsupportedError, match="bloom"):
        rehost({"model_type": "bloom"}, {}, 1)
