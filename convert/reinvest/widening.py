"""Planning a wider model: how wide, what becomes of each tensor, and that it computes the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rehead.convert.families.spec import Config
from rehead.convert.model import Model, resolve_config
from rehead.convert.reinvest import proof
from rehead.convert.reinvest.arithmetic import BlockSizes, ffn_width, hidden_width, proportional_hidden_width
from rehead.convert.reinvest.changes import Change, Slot, Variant, ffn_changes, hidden_changes, slots
from rehead.errors import ReheadError, UnsupportedError, UsageError

#: Where configs keep the FFN's width and the norms' epsilon; the first that a config has counts.
_FFN_KEYS = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
_EPSILON_KEYS = (
    "rms_norm_eps",
    "norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "layernorm_epsilon",
)
_DEFAULT_MULTIPLE = 128


@dataclass(frozen=True)
class Widening:
    """A wider model.

    Attributes:
        raw_config: its ``config.json``; config: the same, resolved.
        changes: what becomes of each tensor that changes, by the checkpoint's name: a pure function of the tensor.
        shapes: its shape afterwards.
        facts: the arithmetic, for the plan.
        rounds: weights are scaled, so in a 16-bit dtype the function is kept up to rounding.
    """

    raw_config: dict[str, Any]
    config: Config
    changes: dict[str, Callable[[Tensor], Tensor]]
    shapes: dict[str, tuple[int, ...]]
    facts: dict[str, Any]
    rounds: bool


def widen(
    model: Model, raw: dict[str, Any], config: Config, kv: int, what: str, multiple: int | None, seed: int
) -> Widening:
    """Plan the widening of a model whose KV heads are shared; no weight is read.

    Args:
        model: the model before.
        raw, config: the config of the model with fewer KV heads.
        kv: KV heads after.
        what: ``"ffn"`` or ``"hidden"``.
        multiple: what the new width must be a multiple of; 128 when None.
        seed: of the weights that are drawn.

    Raises:
        UsageError: no KV heads were given up.
        UnsupportedError: the class cannot be widened without changing the function; says why.
    """
    name = f"{model.source.id}: --reinvest {what}"
    if kv == model.num_kv_heads:
        raise UsageError(
            f"--reinvest {what}: nothing is freed while the model keeps its {kv} KV heads; give --kv-heads"
        )
    sizes = _sizes(model, config, name)
    widen_one = _ffn if what == "ffn" else _hidden
    try:
        return widen_one(model, raw, config, sizes, kv, multiple, seed)
    except ReheadError as error:
        raise type(error)(f"{name}: {error}") from None


def _sizes(model: Model, config: Config, name: str) -> BlockSizes:
    key = next((key for key in _FFN_KEYS if hasattr(config, key)), None)
    if key is None:
        raise UnsupportedError(f"{name}: its config does not say how wide its FFN is; leave --reinvest out")
    width = getattr(config, key)
    hidden = int(config.hidden_size)
    width = 4 * hidden if width is None else int(width)
    gated = any(part in slot for slot in slots(config) for part in ("gate_proj", "gate_up_proj"))
    return BlockSizes(hidden, model.num_heads, model.head_dim, width, 3 if gated else 2)


def _facts(sizes: BlockSizes, what: str, before: int, kv: int, key: str, old: int, new: int, multiple: int) -> dict:
    matrices = f"{sizes.ffn_matrices} FFN matrices"
    freed = sizes.weights(before) - sizes.weights(kv)
    return {
        "what": what,
        "key": key,
        "before": old,
        "after": new,
        "multiple_of": multiple,
        "freed_per_layer": freed,
        "arithmetic": (
            f"2 x {sizes.hidden} x ({before} - {kv}) x {sizes.head_dim} = {freed:,} weights a layer; "
            + (
                f"/ ({matrices} x {sizes.hidden}) = {freed / (sizes.ffn_matrices * sizes.hidden):.1f} channels; "
                if what == "ffn"
                else f"{sizes.weights(before):,} weights over {sizes.weights(kv) // sizes.hidden:,} a channel = "
                f"{sizes.weights(before) / (sizes.weights(kv) // sizes.hidden):.1f} channels; "
            )
            + f"{old} -> {new}, a multiple of {multiple}"
        ),
    }


def _raw_key(raw: dict[str, Any], config: Config, key: str) -> str:
    """The name under which ``config.json`` holds a key that the class may know under two."""
    alias = getattr(type(config), "attribute_map", {}).get(key)
    return alias if alias is not None and key not in raw else key


def _ffn(
    model: Model, raw: dict[str, Any], config: Config, sizes: BlockSizes, kv: int, multiple: int | None, seed: int
) -> Widening:
    key = next(key for key in _FFN_KEYS if hasattr(config, key))
    before = model.num_kv_heads
    multiple = multiple or _DEFAULT_MULTIPLE
    width = ffn_width(sizes, before, kv, multiple)
    new_raw = {**copy.deepcopy(raw), _raw_key(raw, config, key): width}
    new = resolve_config(new_raw, model.source.id)
    small = proof.shrunk(config)
    narrow = 4 * small.hidden_size if getattr(small, key) is None else getattr(small, key)
    wide = proof.shrunk(config, **{key: narrow + 40})
    changes = ffn_changes(slots(small), slots(wide), narrow, seed)
    source = proof.tiny(small)
    result = proof.widened(source, wide, changes)
    _require(proof.distance(proof.states(result)[1], proof.states(source)[1]))
    wider = slots(new)
    changes, shapes = _by_checkpoint_name(model, ffn_changes(slots(config), wider, sizes.ffn, seed), wider)
    facts = _facts(sizes, "ffn", before, kv, key, sizes.ffn, width, multiple)
    return Widening(new_raw, new, changes, shapes, facts, rounds=False)


def _hidden(
    model: Model, raw: dict[str, Any], config: Config, sizes: BlockSizes, kv: int, multiple: int | None, seed: int
) -> Widening:
    before = model.num_kv_heads
    epsilon = next((key for key in _EPSILON_KEYS if hasattr(config, key)), None)
    small = proof.shrunk(config, **({epsilon: proof.EPSILON} if epsilon else {}))
    norm = _centring(proof.tiny(small))
    if norm is not None:
        would_be = proportional_hidden_width(sizes, before, kv)
        raise UnsupportedError(
            f"its norms ({norm}) subtract the mean, which zero channels would shift, so a hidden size of {would_be} "
            "would not compute the same; use --reinvest ffn"
        )
    if epsilon is None:
        raise UnsupportedError("its config does not say what its norms' epsilon is; use --reinvest ffn")
    multiple = _multiple_for_heads(config, sizes, multiple)
    width = hidden_width(sizes, before, kv, multiple)
    new_raw, new = _wider(raw, config, width, epsilon, model.head_dim, model.source.id)
    small_raw = {**small.to_dict()}
    tiny_dim = model.family.head_dim(small)
    _, wide = _wider(small_raw, small, small.hidden_size + 40, epsilon, tiny_dim, model.source.id)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    variant = _variant(model, small, wide, tied, seed)
    if variant.embedding != 1.0:  # the small model has shown that the class scales by the root of the hidden size
        variant = Variant(variant.offset, variant.queries_scaled, (sizes.hidden / width) ** 0.5)
    narrow, wider = slots(config), slots(new)
    queries = _query_names(model, config, narrow)
    found = hidden_changes(narrow, wider, (sizes.hidden, width), variant, seed, tied, queries)
    changes, shapes = _by_checkpoint_name(model, found, wider)
    facts = _facts(sizes, "hidden", before, kv, "hidden_size", sizes.hidden, width, multiple)
    return Widening(new_raw, new, changes, shapes, facts, rounds=True)


def _multiple_for_heads(config: Config, sizes: BlockSizes, multiple: int | None) -> int:
    """What a new hidden size must be a multiple of: some classes want whole heads, though their head size is given.

    Raises:
        UnsupportedError: the multiple asked for does not go with the class.
    """
    asked = multiple or _DEFAULT_MULTIPLE
    trial = {**config.to_dict(), "hidden_size": sizes.heads * sizes.head_dim * asked + asked}
    try:
        type(config).from_dict(trial | {"head_dim": sizes.head_dim})
    except Exception:
        whole = math.lcm(sizes.heads, 8)
        if multiple is None:
            return asked if asked % sizes.heads == 0 else whole
        if multiple % sizes.heads:
            raise UnsupportedError(
                f"its class wants a hidden size that its {sizes.heads} query heads divide; give --multiple-of {whole}"
            ) from None
    return asked


def _wider(
    raw: dict[str, Any], config: Config, width: int, epsilon: str, head_dim: int, name: str
) -> tuple[dict[str, Any], Config]:
    shrink = int(config.hidden_size) / width
    changed = {
        **copy.deepcopy(raw),
        _raw_key(raw, config, "hidden_size"): width,
        _raw_key(raw, config, epsilon): getattr(config, epsilon) * shrink,
        "head_dim": head_dim,
    }
    return changed, resolve_config(changed, name)


def _variant(model: Model, small: Config, wide: Config, tied: bool, seed: int) -> Variant:
    """How the class's norms and embeddings work: the first way under which the small model computes the same."""
    source = proof.tiny(small)
    first, logits = proof.states(source)
    old, new = slots(small), slots(wide)
    sizes = (int(small.hidden_size), int(wide.hidden_size))
    queries = _query_names(model, small, old)
    best = float("inf")
    for offset in (0.0, 1.0):
        for scaled in (False, True):
            variant = Variant(offset, scaled)
            changes = hidden_changes(old, new, sizes, variant, seed, tied, queries)
            ours, _ = proof.states(proof.widened(source, wide, changes))
            ratio = float(ours[..., : sizes[0]].norm() / first.norm())
            if abs(ratio - (sizes[1] / sizes[0]) ** 0.5) < 1e-4:
                variant = Variant(offset, scaled, (sizes[0] / sizes[1]) ** 0.5)
                changes = hidden_changes(old, new, sizes, variant, seed, tied, queries)
            gap = proof.distance(proof.states(proof.widened(source, wide, changes))[1], logits)
            if gap < proof.TOLERANCE:
                return variant
            best = min(best, gap)
    _require(best)
    raise AssertionError("unreachable")


def _require(gap: float) -> None:
    if not gap < proof.TOLERANCE:
        raise UnsupportedError(
            f"a small model of its class computes something else when it is widened (logits off by {gap:.1e}); "
            "leave --reinvest out"
        )


def _centring(model: Any) -> str | None:
    """The type of a norm over the hidden channels that subtracts their mean, or None."""
    import torch

    width = model.config.hidden_size
    for module in model.modules():
        name = type(module).__name__
        if list(module.children()) or "Norm" not in name:
            continue
        weight = getattr(module, "weight", None)
        if weight is not None and tuple(weight.shape) != (width,):
            continue
        bias = getattr(module, "bias", None)
        with torch.no_grad():
            flat = module(torch.full((1, width), 3.0)) - (0 if bias is None else bias)
        if float(flat.abs().max()) < 1e-4:
            return name
    return None


def _query_names(model: Model, config: Config, found: dict[str, Slot]) -> frozenset[str]:
    """The class's parameters of query and key projections in layers where these are normed."""
    family = model.family
    if family.packing != "separate":
        return frozenset()
    stems = (family.names.query, family.names.key)
    names = set()
    for layer in family.attention_layers(config):
        if family.norm_of(config, layer) != "none":
            prefix = model.module_layer.format(i=layer) + family.attention
            names |= {f"{prefix}{stem}.{part}" for stem in stems for part in ("weight", "bias")}
    return frozenset(names & found.keys())


def _by_checkpoint_name(
    model: Model, changes: dict[str, Change], wider: dict[str, Slot]
) -> tuple[dict[str, Change], dict[str, tuple[int, ...]]]:
    """The changes and the new shapes by the checkpoint's own names.

    Raises:
        UnsupportedError: the checkpoint keeps a tensor that changes in another form than the class does.
    """
    ours = {model.module_name(name): name for name in model.source.tensors}
    missing = [name for name in changes if name not in ours and name != "lm_head.weight"]  # which may be tied
    if missing:
        raise UnsupportedError(
            f"the checkpoint keeps {missing[0]} in another form than its class does (merged experts, say), which "
            "cannot be widened yet; leave --reinvest out"
        )
    present = {name: ours[name] for name in changes if name in ours}
    return (
        {checkpoint: changes[name] for name, checkpoint in present.items()},
        {checkpoint: wider[name].shape for name, checkpoint in present.items()},
    )
