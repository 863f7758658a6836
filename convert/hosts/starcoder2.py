"""StarCoder 2 as host: a serial block with LayerNorm, biases, a plain FFN and RoPE over the whole head."""

from __future__ import annotations

from rehead.convert.hosts.rope import refuse_rope
from rehead.convert.hosts.serial import BUFFERS, common_config, common_tensors, norms
from rehead.models.families.rope import rope_fields
from rehead.models.rewrite import Builder, Rewrite


def host(build: Builder) -> Rewrite:
    """A GPT-NeoX with serial blocks and full RoPE as StarCoder 2.

    Raises:
        UnsupportedError: parallel blocks, or RoPE over a part of the head.
    """
    config = build.config
    refuse_rope(build, spanning=True)
    size, turning = build.source.head_dim(config), build.source.rotary_dims(config, 0)
    result = common_config(build, "Starcoder2ForCausalLM")
    if turning != size:
        raise build.refuse(
            f"RoPE turns {turning} of {size} dimensions of its heads and all of StarCoder 2's; use --host nemotron"
        )
    result |= {
        "norm_epsilon": config.layer_norm_eps,
        "residual_dropout": config.hidden_dropout,
        "embedding_dropout": config.hidden_dropout,
        "sliding_window": None,
        "use_bias": True,
        **rope_fields(config.rope_parameters, turning, size),
    }
    step = common_tensors(build, "c_fc", "c_proj")
    for new, old in norms(build):
        build.pair(new, old)
    return build.finish(result, step, BUFFERS)
