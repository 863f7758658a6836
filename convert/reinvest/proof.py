"""Widening proved on numbers before any weight is read: a small model of the same class and switches, both widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rehead.console import quiet_transformers
from rehead.models.config import causal_lm_class
from rehead.models.live import decoder_layers
from rehead.models.tiny import LAYERS, LISTS, SIZES, randomize

#: An epsilon large enough that a norm which gets it wrong shows.
EPSILON = 0.05
TOLERANCE = 1e-5
_VOCAB = 64
#: What classes read from the rotary parameters, whatever the type of scaling.
_KEPT_ROPE = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")


def shrunk(config: Any, **overrides: Any) -> Any:
    """A config of the same class and switches with every size cut down; its rotary positions are plain ones.

    Raises whatever the class raises for a config that it does not take.
    """
    raw = copy.deepcopy(config.to_dict())
    depth = LAYERS
    for name in LISTS:
        values = raw.get(name)
        if isinstance(values, list) and values:
            kinds = list(dict.fromkeys(values))
            depth = max(depth, len(kinds))
            raw[name] = kinds
    for name in LISTS:
        if isinstance(raw.get(name), list) and raw[name]:
            raw[name] = (raw[name] * depth)[:depth]
    aliases = getattr(type(config), "attribute_map", {})
    ratio = max(1, int(config.num_attention_heads) // int(getattr(config, "num_key_value_heads", 0) or 1))
    for name, size in SIZES.items():
        if raw.get(aliases.get(name, name)) is not None and not isinstance(raw.get(name), (list, dict, bool)):
            raw[aliases.get(name, name)] = size
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in raw:
            raw[name] = depth
    if "num_key_value_heads" in raw:
        raw["num_key_value_heads"] = max(1, 4 // ratio)
    raw |= {"vocab_size": _VOCAB, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "parallel_layers": None}
    if "parallel_layers" not in config.to_dict():
        raw.pop("parallel_layers")
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        kept = {key: rope[key] for key in _KEPT_ROPE if key in rope}
        raw["rope_parameters"] = {"rope_type": "default", **kept}
    raw |= overrides
    raw.pop("dtype", None)
    return type(config).from_dict(raw)


def tiny(config: Any, seed: int = 0) -> nn.Module:
    """A random float32 model of a shrunk config, in evaluation mode."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = causal_lm_class(config)(config)
    return randomize(model.float(), seed).eval()


def states(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(what the first layer is called with, logits) on a few tokens."""
    tokens = torch.arange(24).view(2, 12) * 7 % _VOCAB
    seen: list[Tensor] = []
    layers = decoder_layers(model)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return seen[0], logits


def widened(model: nn.Module, config: Any, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> nn.Module:
    """The small model at the other width."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        target: Any = causal_lm_class(config)(config)
    state = {name: changes[name](tensor) if name in changes else tensor for name, tensor in model.state_dict().items()}
    target.load_state_dict(state)
    return target.float().eval()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the logits' own size."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
