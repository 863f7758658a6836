"""Classes whose config switches the block's form, and what becomes of their norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.equivalent_heads import with_norm_folded
from rehead.models.families.resolve import with_checkpoint_prefix
from rehead.models.families.table import FAMILIES
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Builder, Derived, Read, Rewrite

#: A shared norm is one that divides: what its weight all but deletes cannot be brought back for the other reader.
_VANISHING = 1e-4


def _raw(model: Model, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(model.source.config), **changes}


def _renamed(model: Model, raw: dict[str, Any], swap: Mapping[str, Sequence[str]]) -> Rewrite:
    """Every tensor as bytes; those of a module that ``swap`` names stand under each of the names that it gives."""

    def names(old: str) -> list[str]:
        *place, module, kind = ["", *old.split(".")]
        return [".".join([*place, new, kind])[1:] for new in swap.get(module, [module])]

    tensors = {new: Derived((old,), info.shape) for old, info in model.source.tensors.items() for new in names(old)}
    return Rewrite("block", raw, model.family, tensors)


def gpt_neox(model: Model, form: str) -> Rewrite:
    """Two norms in either form: only the switch moves."""
    return _renamed(model, _raw(model, use_parallel_residual=form == "parallel"), {})


def falcon(model: Model, form: str) -> Rewrite:
    """A parallel block with two norms is the new decoder's; with one it is the old one's.

    Raises:
        UnsupportedError: a serial block of between 1 and all KV heads, which only the new, parallel decoder holds.
    """
    config, heads, kv = model.config, model.num_heads, model.num_kv_heads
    if form == "parallel":
        raw = _raw(model, new_decoder_architecture=True, parallel_attn=True, num_ln_in_parallel_attn=2, num_kv_heads=kv)
        swap = {"input_layernorm": ["ln_attn"], "post_attention_layernorm": ["ln_mlp"]}
    else:
        if kv not in (1, heads):
            raise UnsupportedError(
                f"falcon: its class holds {kv} KV heads in parallel blocks only; use --kv-heads 1 in a run before"
            )
        raw = _raw(model, new_decoder_architecture=False, parallel_attn=False, multi_query=kv == 1)
        raw.pop("num_ln_in_parallel_attn", None)
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
            swap = {"ln_attn": ["input_layernorm"], "ln_mlp": ["post_attention_layernorm"]}
        else:
            swap = {"input_layernorm": ["input_layernorm", "post_attention_layernorm"]}
    return _renamed(model, raw, swap)


def stablelm(model: Model, form: str) -> Rewrite:
    """One norm in the parallel form, two in the serial one.

    The FFN has no bias that could take up a norm's, so the shared norm is the FFN's, and what the attention's had of
    its own goes into queries, keys and values: ``w1 z + b1 = r (w2 z + b2) + (b1 - r b2)`` with ``r = w1 / w2``.
    """
    if form == "serial":
        swap = {"input_layernorm": ["input_layernorm", "post_attention_layernorm"]}
        return _renamed(model, _raw(model, use_parallel_residual=False), swap)
    family = FAMILIES["stablelm"]
    target = with_checkpoint_prefix(family, model.source.tensors)
    build = Builder(family, target, model.config, model.source.config, model.source.tensors, "block")
    first, second = "input_layernorm", "post_attention_layernorm"

    def norms(layer: int) -> list[str]:
        stem = build.source.layer.format(i=layer)
        return [f"{stem}{norm}.{part}" for norm in (first, second) for part in ("weight", "bias")]

    def change(heads: Heads, layer: int, read: Read) -> Heads:
        w1, b1, w2, b2 = (read(name).float() for name in norms(layer))
        _refuse_vanishing(w2, layer)
        ratio = w1 / w2
        return with_norm_folded(heads, ratio, b1 - ratio * b2)

    step = build.attention(change, norms)
    build.rounds = True
    attention = set(build.tensors)
    for name in model.source.tensors:
        if first in name:
            build.make(name, (name.replace(first, second),), torch.clone)
        elif second not in name and name not in attention:
            build.copy(name, name)
    raw = _raw(model, use_parallel_residual=True, use_qkv_bias=True)
    return build.finish(raw, step, r"rotary_emb\.inv_freq$")


def _refuse_vanishing(weight: Tensor, layer: int) -> None:
    if weight.is_meta:
        return
    size = weight.abs()
    if float(size.min()) < _VANISHING * float(size.mean()):
        raise UnsupportedError(
            f"stablelm: the FFN's norm in layer {layer} deletes channel {int(size.argmin())}, which attention reads, "
            "and a parallel block has one norm for both; leave --block out"
        )


SWITCHES: dict[str, Callable[[Model, str], Rewrite]] = {"gpt_neox": gpt_neox, "stablelm": stablelm, "falcon": falcon}
