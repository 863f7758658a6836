"""How logits come from hidden states: found on live models of every kind, and refused where it cannot be found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError
from rehead.recipes.training.losses.head import base_model, final_hidden, find_head

# What stands behind the head, by model type and the config that brings it about.
SHAPES = {
    "llama": ({}, 1.0, None),
    "gemma2": ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
    "recurrent_gemma": ({"logits_soft_cap": 20.0}, 1.0, 20.0),
    "nanochat": ({"final_logit_softcapping": 15.0}, 1.0, 15.0),
    "cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "falcon_h1": ({"lm_head_multiplier": 0.04}, 0.04, None),
    "phi": ({}, 1.0, None),
    "gpt2": ({}, 1.0, None),
    "llama4_text": ({}, 1.0, None),
    "opt": ({}, 1.0, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SHAPES)
def test_scale_and_cap_are_found(model_type, dtype) -> None:
    options, scale, cap = SHAPES[model_type]
    model = tiny_model(model_type, **options).to(dtype)
    head = find_head(model)
    assert (head.shape.scale, head.shape.cap) == (scale, cap)
    assert head.linear
    assert head.hidden_scale == 1.0
    assert (head.bias is not None) == (model_type == "phi")
    ids = torch.arange(7)[None] + 3
    with torch.no_grad():
        want = model.eval()(input_ids=ids, use_cache=False).logits.float()
        hidden = final_hidden(base_model(model)(input_ids=ids, use_cache=False))
        raw = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    got = head.shape.apply(raw.float())
    assert float((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_factor_before_the_head_is_found() -> None:
    model = tiny_model("minicpm3", dim_model_base=16, hidden_size=64)
    assert find_head(model).hidden_scale == 0.25


def test_modes_hooks_and_weights_are_left_as_they_were() -> None:
    model = tiny_model("gemma2").train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_head(model)
    assert model.training
    assert not model.model.layers[1].training
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_low_rank_adapter_on_the_head_is_called_rather_than_read() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["lm_head"]))
    assert not find_head(model).linear
    assert find_head(peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))).linear


def test_rows_that_pad_the_vocabulary_are_left_out() -> None:
    head = find_head(tiny_model("llama")).narrowed(100)
    assert head.weight.shape[0] == 100
    assert head.shape.vocabulary == 100


@pytest.mark.parametrize(
    "change",
    [lambda z: z * 1.37, lambda z: z + 1.0, lambda z: z.clamp(-30, 30), lambda z: z - z.mean(-1, keepdim=True)],
    ids=["unnamed scale", "shift", "clamp", "centred"],
)
def test_what_the_config_does_not_explain_is_refused(change) -> None:
    model = tiny_model("llama")
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Changed
    with pytest.raises(UnsupportedError, match=r"^[^\n]*no number in its config explains[^\n]*$"):
        find_head(model)


@pytest.mark.parametrize("model_type", ["bert", "modernbert-decoder"])
def test_a_transform_between_base_and_head_is_refused(model_type) -> None:
    with pytest.raises(UnsupportedError, match="does not read its base model's last hidden states"):
        find_head(tiny_model(model_type))


def test_no_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no output embedding"):
        find_head(nn.Linear(2, 2))
