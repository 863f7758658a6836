"""Re-hosting: the same function under another model type, where the model's own class cannot hold fewer KV heads.

A rehost is data: the new config, and for each tensor of the result where it comes from. What it does to the layers'
heads is left to the layer step, which reads them by one family and writes them by the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rehead.convert.families.resolve import with_checkpoint_prefix
from rehead.convert.families.spec import Family
from rehead.convert.families.table import FAMILIES
from rehead.errors import UnsupportedError


@dataclass(frozen=True)
class Placement:
    """Where one tensor of the result comes from.

    Attributes:
        how: ``"copy"``, ``"transpose"`` (of a matrix), or ``"layer"`` for one that the layer step writes.
        source: the source tensor that is copied or transposed; for ``"layer"`` the one in whose place it is stored.
        layer: the layer whose step writes it, else None.
    """

    how: Literal["copy", "transpose", "layer"]
    source: str
    layer: int | None = None


@dataclass(frozen=True)
class Rehost:
    """A model under another model type.

    Attributes:
        config: raw ``config.json`` of the result.
        source: the family that reads the source's heads, its prefix the checkpoint's own.
        target: the family that writes the result's.
        tensors: a placement for every tensor of the result, by its new name, in the source's order.
        dropped: source tensors that the result has no use for (buffers that older versions saved).
    """

    config: dict[str, Any]
    source: Family
    target: Family
    tensors: dict[str, Placement]
    dropped: tuple[str, ...]


def rehost(raw: Mapping[str, Any], tensors: Mapping[str, Any], num_key_value_heads: int) -> Rehost:
    """Plan the re-hosting of a checkpoint; no weight is read.

    Args:
        raw: the source's raw ``config.json``.
        tensors: the source's tensors by name, each with a ``shape``.
        num_key_value_heads: KV heads of the result.

    Raises:
        UnsupportedError: no class can stand in for this model type, or not without changing the function.
    """
    model_type = str(raw.get("model_type"))
    if model_type not in REHOSTS:
        raise UnsupportedError(
            f"{model_type}: no other class can stand in for its own; of these one can: {', '.join(REHOSTS)}"
        )
    return REHOSTS[model_type](raw, tensors, num_key_value_heads)


# ---- GPT-2 as GPT-BigCode: the same block, with nn.Linear in Conv1D's place and a switch for a single KV head.

# What both configs hold under the same name and mean alike; written out, since the classes' defaults differ.
_SHARED = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_weights",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
# What travels as it is where the source's config has it.
_CARRIED = ("dtype", "torch_dtype", "transformers_version", "task_specific_params", "id2label", "label2id")
# GPT-2's own switches that GPT-BigCode lacks, and what they would change.
_OWN_SWITCHES = {
    "scale_attn_by_inverse_layer_idx": "scales each layer's attention by its index",
    "reorder_and_upcast_attn": "computes attention scores in another order and precision",
    "add_cross_attention": "adds cross-attention",
}

_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")
_MLP = re.compile(r"h\.\d+\.mlp\.(c_fc|c_proj)\.weight$")
_ATTENTION = re.compile(r"h\.(\d+)\.attn\.(c_attn|c_proj)\.(weight|bias)$")
_COPIED = re.compile(
    r"(wte\.weight|wpe\.weight|ln_f\.(weight|bias)|h\.\d+\.(ln_[12]\.(weight|bias)|mlp\.c_\w+\.bias))$"
)


def gpt2_as_bigcode(raw: Mapping[str, Any], tensors: Mapping[str, Any], num_key_value_heads: int) -> Rehost:
    """GPT-2 as GPT-BigCode with one KV head, or with one for each query head.

    Hub checkpoints without the ``transformer.`` prefix and those that saved the causal mask as a buffer are taken too.

    Raises:
        UnsupportedError: a number of KV heads between, a switch of GPT-2's that GPT-BigCode lacks, an activation that
            transformers lacks, or a tensor that has no place in the result.
    """
    from transformers import CONFIG_MAPPING
    from transformers.activations import ACT2FN

    config = CONFIG_MAPPING["gpt2"].from_dict(dict(raw))
    heads = int(config.n_head)
    if num_key_value_heads not in (1, heads):
        raise UnsupportedError(
            f"gpt2: GPT-BigCode, its stand-in, holds 1 or {heads} KV heads, not {num_key_value_heads}; use --kv-heads 1"
        )
    for switch, effect in _OWN_SWITCHES.items():
        if getattr(config, switch, False):
            raise UnsupportedError(
                f"gpt2: {switch} {effect}, which GPT-BigCode, its stand-in, cannot; give a GPT-2 without it"
            )
    if config.activation_function not in ACT2FN:
        raise UnsupportedError(
            f"gpt2: transformers has no activation {config.activation_function!r}; mend activation_function"
        )
    result: dict[str, Any] = {key: raw[key] for key in _CARRIED if key in raw}
    result |= {key: getattr(config, key) for key in _SHARED}
    result |= {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "multi_query": num_key_value_heads == 1,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    }
    placements: dict[str, Placement] = {}
    dropped = []
    for name in tensors:
        bare = name.removeprefix("transformer.")
        target = f"transformer.{bare}"
        if _BUFFER.match(bare):
            dropped.append(name)
        elif match := _ATTENTION.match(bare):
            placements[target] = Placement("layer", name, int(match[1]))
        elif _MLP.match(bare):
            placements[target] = Placement("transpose", name)
        elif _COPIED.match(bare):
            placements[target] = Placement("copy", name)
        elif name == "lm_head.weight":
            placements[name] = Placement("copy", name)
        else:
            raise UnsupportedError(f"gpt2: {name} has no place in GPT-BigCode, its stand-in; give a plain GPT-2")
    source = with_checkpoint_prefix(FAMILIES["gpt2"], tensors)
    return Rehost(result, source, replace(FAMILIES["gpt_bigcode"]), placements, tuple(dropped))


REHOSTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], int], Rehost]] = {"gpt2": gpt2_as_bigcode}
