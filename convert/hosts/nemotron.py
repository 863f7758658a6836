"""Nemotron as host: a serial block with LayerNorm, biases, a plain FFN and partial RoPE.

Its norms store their weight less one.
"""

from __future__ import annotations

from torch import Tensor

from rehead.convert.hosts.rope import refuse_rope
from rehead.convert.hosts.serial import BUFFERS, common_config, common_tensors, norms
from rehead.models.families.rope import rope_fields
from rehead.models.rewrite import Builder, Rewrite


def host(build: Builder) -> Rewrite:
    """A GPT-NeoX with serial blocks as Nemotron.

    Raises:
        UnsupportedError: parallel blocks.
    """
    config = build.config
    refuse_rope(build, spanning=True)
    size = build.source.head_dim(config)
    result = common_config(build, "NemotronForCausalLM") | {
        "head_dim": size,
        "norm_eps": config.layer_norm_eps,
        "attention_bias": True,
        "mlp_bias": True,
        **rope_fields(config.rope_parameters, build.source.rotary_dims(config, 0), size),
    }
    step = common_tensors(build, "up_proj", "down_proj")
    for new, old in norms(build):
        build.make(f"{new}.weight", (f"{old}.weight",), _less_one, rounds=True)
        build.copy(f"{new}.bias", f"{old}.bias")
    return build.finish(result, step, BUFFERS)


def _less_one(weight: Tensor) -> Tensor:
    return weight - 1
