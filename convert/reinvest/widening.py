"""Planning a wider model: how wide, what becomes of each tensor, and that it computes the same."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from rehead.convert.reinvest import proof
from rehead.convert.reinvest.arithmetic import BlockSizes, ffn_width, hidden_width, proportional_hidden_width
from rehead.convert.reinvest.changes import ClassNorms, Resize, Slot, ffn_changes, hidden_changes, resized, slots
from rehead.errors import ReheadError, UnsupportedError, UsageError
from rehead.models.config import own_config, resolve_config
from rehead.models.families.spec import Config
from rehead.models.model import Model
from rehead.models.rewrite import Derived, Rewrite, layer_in, unchanged

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


def widen(model: Model, before: int, what: str, multiple: int | None = None, seed: int = 0) -> Rewrite:
    """A model whose KV heads are shared, widened by what that freed; no weight is read.

    Args:
        model: the model with fewer KV heads.
        before: KV heads that it had.
        what: ``"ffn"`` or ``"hidden"``.
        multiple: what the new width must be a multiple of; 128 when None.
        seed: of the weights that are drawn.

    Returns:
        A Rewrite that keeps the function; its facts give the arithmetic.

    Raises:
        UsageError: no KV heads were given up.
        UnsupportedError: the class cannot be widened without changing the function; says why.
    """
    name = f"{model.source.id}: --reinvest {what}"
    if before == model.num_kv_heads:
        raise UsageError(
            f"--reinvest {what}: nothing is freed while the model keeps its {before} KV heads; give --kv-heads"
        )
    model = replace(model, config=own_config(model.config))  # whose class is built at other widths
    try:
        return (_ffn if what == "ffn" else _hidden)(model, before, multiple, seed)
    except ReheadError as error:
        raise type(error)(f"{name}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A class that ties other sizes to the one that grows fails somewhere in its own code.
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        remedy = "use --reinvest ffn" if what == "hidden" else "leave --reinvest out"
        raise UnsupportedError(f"{name}: its class does not run at another width ({reason}); {remedy}") from error


def _ffn_key(config: Config) -> str:
    key = next((key for key in _FFN_KEYS if hasattr(config, key)), None)
    if key is None:
        raise UnsupportedError("its config does not say how wide its FFN is in a way known here; leave --reinvest out")
    return key


def _ffn_width(config: Config) -> int:
    width = getattr(config, _ffn_key(config))
    return 4 * int(config.hidden_size) if width is None else int(width)


def _sizes(model: Model, ffn_matrices: int) -> BlockSizes:
    """The sizes of a model; what is neither attention nor FFN is counted in the class itself."""
    config = model.config
    hidden, blocks = int(config.hidden_size), int(config.num_hidden_layers)
    width = _ffn_width(config)
    sizes = BlockSizes(hidden, model.num_heads, model.head_dim, width, ffn_matrices, blocks, len(model.layers))
    shapes = [slot.shape for name, slot in slots(config).items() if layer_in(name) is not None]
    every = sum(math.prod(shape) for shape in shapes if len(shape) > 1 and hidden in shape)
    return replace(sizes, other=(every - sizes.weights(model.num_kv_heads)) // hidden)


def _ffn_matrices(config: Config, wider: Config, by: int) -> int:
    """Matrices of a block that run along the FFN's channels, of which the wider config has ``by`` more.

    Raises:
        UnsupportedError: not every block has an FFN of that width, or the class makes another width of it.
    """
    before, after = slots(config), slots(wider)
    blocks, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    grown = [name for name in resized(before, after) if len(before[name].shape) > 1]
    having = {layer_in(name) for name in grown}
    if len(having) != blocks:
        raise UnsupportedError(
            f"{len(having)} of its {blocks} layers alone have an FFN of that width (a mixture of experts?) and would "
            "have to take what all of them free; leave --reinvest out"
        )
    weights = sum(math.prod(after[name].shape) - math.prod(before[name].shape) for name in grown)
    matrices, rest = divmod(weights, blocks * hidden * by)
    if rest or not matrices:
        raise UnsupportedError("its class makes an FFN width of its own of the config's; leave --reinvest out")
    return matrices


def _facts(sizes: BlockSizes, what: str, before: int, kv: int, key: str, old: int, new: int, multiple: int) -> dict:
    one = replace(sizes, blocks=1, attention_blocks=1, other=0)
    # Where blocks are alike, one of them says it all.
    counted, where = (one, "a layer") if sizes.uniform else (sizes, f"in {sizes.attention_blocks} attention layers")
    freed = counted.weights(before) - counted.weights(kv)
    every = "" if sizes.uniform else f" x {sizes.blocks} layers"
    times = "" if sizes.uniform else f" x {sizes.attention_blocks}"
    a_channel = counted.weights(kv) // sizes.hidden
    return {
        "what": what,
        "key": key,
        "before": old,
        "after": new,
        "multiple_of": multiple,
        "freed_per_layer": one.weights(before) - one.weights(kv),
        "arithmetic": (
            f"2 x {sizes.hidden} x ({before} - {kv}) x {sizes.head_dim}{times} = {freed:,} weights {where}; "
            + (
                f"/ ({sizes.ffn_matrices} FFN matrices x {sizes.hidden}{every}) = "
                f"{freed / counted.ffn_channel:.1f} channels; "
                if what == "ffn"
                else f"{counted.weights(before):,} weights over {a_channel:,} a channel = "
                f"{counted.weights(before) / a_channel:.1f} channels; "
            )
            + f"{old} -> {new}, a multiple of {multiple}"
        ),
    }


def _raw_key(raw: dict[str, Any], config: Config, key: str) -> str:
    """The name under which ``config.json`` holds a key that the class may know under two."""
    alias = getattr(type(config), "attribute_map", {}).get(key)
    return alias if alias is not None and key not in raw else key


def _ffn(model: Model, before: int, multiple: int | None, seed: int) -> Rewrite:
    raw, config = model.source.config, model.config
    key = _ffn_key(config)
    multiple = multiple or _DEFAULT_MULTIPLE
    small = proof.shrunk(config)
    narrow = 4 * small.hidden_size if getattr(small, key) is None else getattr(small, key)
    wide = proof.shrunk(config, **{key: narrow + 40})
    changes = ffn_changes(slots(small), slots(wide), narrow, seed)
    source = proof.tiny(small)
    result = proof.widened(source, wide, changes)
    _require(proof.distance(proof.states(result)[1], proof.states(source)[1]))

    def at(width: int) -> tuple[dict[str, Any], Config]:
        changed = {**copy.deepcopy(raw), _raw_key(raw, config, key): width}
        return changed, resolve_config(changed, model.source.id)

    _, trial = at(_ffn_width(config) + multiple)
    sizes = _sizes(model, _ffn_matrices(config, trial, multiple))
    width = ffn_width(sizes, before, model.num_kv_heads, multiple)
    new_raw, new = at(width)
    wider = slots(new)
    facts = _facts(sizes, "ffn", before, model.num_kv_heads, key, sizes.ffn, width, multiple)
    return _rewrite(model, new_raw, ffn_changes(slots(config), wider, sizes.ffn, seed), wider, facts)


def _hidden(model: Model, before: int, multiple: int | None, seed: int) -> Rewrite:
    raw, config, kv = model.source.config, model.config, model.num_kv_heads
    gated = any(part in slot for slot in slots(config) for part in ("gate_proj", "gate_up_proj"))
    sizes = _sizes(model, 3 if gated else 2)
    # A class may have the key of another kind of norm and not use it.
    epsilon = next((key for key in _EPSILON_KEYS if getattr(config, key, None) is not None), None)
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
    norms = _norm_kind(model, small, wide, tied, seed)
    if norms.embedding != 1.0:  # the small model has shown that the class scales by the root of the hidden size
        norms = replace(norms, embedding=(sizes.hidden / width) ** 0.5)
    narrow, wider = slots(config), slots(new)
    queries = _query_names(model, config, narrow)
    changes = hidden_changes(narrow, wider, (sizes.hidden, width), norms, seed, tied, queries)
    facts = _facts(sizes, "hidden", before, kv, "hidden_size", sizes.hidden, width, multiple)
    return replace(_rewrite(model, new_raw, changes, wider, facts), rounds=True)


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
    try:
        return changed, resolve_config(changed, name)
    except UnsupportedError:
        raise UnsupportedError(
            f"its class refuses a hidden size of {width} beside its other sizes; use --reinvest ffn"
        ) from None


def _norm_kind(model: Model, small: Config, wide: Config, tied: bool, seed: int) -> ClassNorms:
    """How the class's norms and embeddings work: the first way under which the small model computes the same."""
    source = proof.tiny(small)
    first, logits = proof.states(source)
    old, new = slots(small), slots(wide)
    sizes = (int(small.hidden_size), int(wide.hidden_size))
    queries = _query_names(model, small, old)
    best = float("inf")
    for offset in (0.0, 1.0):
        for scaled in (False, True):
            kind = ClassNorms(offset, scaled)
            changes = hidden_changes(old, new, sizes, kind, seed, tied, queries)
            inputs, _ = proof.states(proof.widened(source, wide, changes))
            ratio = float(inputs[..., : sizes[0]].norm() / first.norm())
            if abs(ratio - (sizes[1] / sizes[0]) ** 0.5) < 1e-4:
                kind = ClassNorms(offset, scaled, (sizes[0] / sizes[1]) ** 0.5)
                changes = hidden_changes(old, new, sizes, kind, seed, tied, queries)
            gap = proof.distance(proof.states(proof.widened(source, wide, changes))[1], logits)
            if gap < proof.TOLERANCE:
                return kind
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


def _rewrite(
    model: Model, raw: dict[str, Any], changes: dict[str, Resize], wider: dict[str, Slot], facts: dict[str, Any]
) -> Rewrite:
    """The changes, which go by the class's names, under the checkpoint's own.

    Raises:
        UnsupportedError: the checkpoint keeps a tensor that changes in another form than the class does.
    """
    by_class = {model.module_name(name): name for name in model.source.tensors}
    missing = [name for name in changes if name not in by_class and name != "lm_head.weight"]  # which may be tied
    if missing:
        raise UnsupportedError(
            f"the checkpoint keeps {missing[0]} in another form than its class does (merged experts, say), which "
            "cannot be widened yet; leave --reinvest out"
        )
    result = unchanged("reinvest", raw, model.family, model.source.tensors)
    for name, change in changes.items():
        if name in by_class:
            stored = by_class[name]
            result.tensors[stored] = Derived((stored,), wider[name].shape, change)
    return replace(result, facts=facts)
