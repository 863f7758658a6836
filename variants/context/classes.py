"""Which class holds a longer context, and the config that says it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import causal_lm_class, resolve_config
from rehead.models.families.spec import Config, Family, rope_parameters
from rehead.models.model import Model
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.rope import ntk_theta, stretch, stretched
from rehead.variants.contract import ALL
from rehead.variants.layer_choice import layers_among

#: Classes that stand in for others where single layers are to rotate in another way or not at all.
HOSTS = {"drope": ("smollm3", "granite_swa"), "ntk": ("granite_swa",)}
ROTATING = "that rotates"
#: Config keys under which RoPE stood before ``rope_parameters``; what is right of them is written again with it.
_OLDER = ("rope_theta", "rope_scaling", "original_max_position_embeddings")


def trained_length(config: Config, options: ContextOptions) -> int:
    """Tokens that a model was trained to read.

    Raises:
        UsageError: its config does not say, and neither do the options.
    """
    length = options.trained or getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UsageError(f"{config.model_type}: its config does not say how long its texts were; give trained=N")
    return length


def said_length(options: ContextOptions) -> int | None:
    """What the result's config says for its length; None where it stays.

    Under ``dynamic`` a class stretches from the length in the config on, which therefore is that of the training.
    """
    return options.trained if options.rope == "dynamic" else options.tokens


def rotating(config: Config, family: Family) -> list[int]:
    """The layers with attention whose heads rotate."""
    layers = family.attention_layers(config)
    return [layer for layer in layers if family.pairing != "none" and family.rotary_dims(config, layer)]


def named_by(config: Config, options: ContextOptions, layers: Sequence[int]) -> list[int]:
    """Those of ``layers`` that the options name."""
    return layers_among(options.layers, int(config.num_hidden_layers), layers, ROTATING)


def of_single_layers(config: Config, options: ContextOptions, layers: Sequence[int]) -> bool:
    """Whether what is asked for needs a class that says layer by layer how heads rotate."""
    return options.rope == "drope" or (options.layers != ALL and named_by(config, options, layers) != list(layers))


def host_of(model: Model, options: ContextOptions, hosts: Sequence[str]) -> str | None:
    """The class that must stand in for a model's own; None where its own does, or none can.

    Args:
        hosts: classes that compute what the model's own does and say more layer by layer.
    """
    kind, layers = model.config.model_type, rotating(model.config, model.family)
    if not layers or not of_single_layers(model.config, options, layers) or kind in HOSTS.get(options.rope, ()):
        return None
    return next((name for name in HOSTS.get(options.rope, ()) if name in hosts), None)


def config_with(model: Model, options: ContextOptions) -> dict[str, Any]:
    """The raw config of a model that reads longer texts.

    Raises:
        UsageError: not longer, or impossible factors.
        UnsupportedError: the class cannot say it.
    """
    config, family, kind = model.config, model.family, model.config.model_type
    layers, trained = rotating(config, family), trained_length(config, options)
    raw = copy.deepcopy(model.source.config)
    if of_single_layers(config, options, layers):
        raw |= _by_layer(config, family, options, layers, trained)
    else:
        raw = {key: value for key, value in raw.items() if key not in _OLDER}
        raw["rope_parameters"] = new_parameters(config, family, options)
        if getattr(config, "layer_rope_theta", None):
            raw |= _by_layer(config, family, options, layers, trained)
        if hasattr(config, "original_max_position_embeddings"):
            raw["original_max_position_embeddings"] = trained
    if (length := said_length(options)) is not None:
        raw["max_position_embeddings"] = length
    try:
        after = resolve_config(raw, model.source.id)
    except UnsupportedError:
        other = _taken(model, options)
        raise UnsupportedError(f"{kind}: its config takes no rope_type {options.rope}; give --rope {other}") from None
    for layer in layers:
        _check(layer, rope_parameters(after, layer), _flat(raw, config, layer), kind)
    return raw


def _taken(model: Model, options: ContextOptions) -> str:
    """A kind of RoPE that a class takes which refuses the one of the options; what ``ntk`` writes all of them take."""
    if options.rope != "longrope":
        try:
            config_with(model, options.but(rope="longrope", factors=None))
            return "longrope"
        except UnsupportedError:
            pass
    return "ntk"


def new_parameters(config: Config, family: Family, options: ContextOptions) -> dict[str, Any]:
    """``rope_parameters`` of the result; of classes with a set for each kind of layer, that of layers without a window.

    Raises:
        UsageError, UnsupportedError: as :func:`config_with`.
    """
    kind = config.model_type
    if not _reads_parameters(config):
        ways = "convert it with --host auto" if family.hosted else "patch the live model with dual_chunk"
        raise UnsupportedError(f"{kind}: its class ignores rope_parameters; {ways}")
    trained = trained_length(config, options)
    parameters = copy.deepcopy(dict(config.rope_parameters))
    kinds = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}

    def changed(old: Mapping[str, Any], layer: int) -> dict[str, Any]:
        return stretched(dict(old), family.rotary_dims(config, layer), trained, options, kind)

    if not kinds:
        return changed(parameters, rotating(config, family)[0])
    if "full_attention" not in kinds:
        raise UnsupportedError(
            f"{kind}: its RoPE differs by unknown kinds of layer; patch the live model with dual_chunk"
        )
    first = next((i for i in rotating(config, family) if config.layer_types[i] == "full_attention"), None)
    if first is None:
        raise UnsupportedError(f"{kind}: no layer without a window rotates, so there is nothing to stretch")
    return parameters | {"full_attention": changed(kinds["full_attention"], first)}


def _by_layer(
    config: Config, family: Family, options: ContextOptions, layers: Sequence[int], trained: int
) -> dict[str, Any]:
    """Config keys of classes that say layer by layer how heads rotate."""
    kind, chosen = config.model_type, named_by(config, options, layers)
    if kind not in HOSTS.get(options.rope, ()):
        ways = " or ".join(HOSTS["drope"])
        if options.rope in HOSTS:
            reason = f"its class cannot say which layers rotate, and {ways}, which can, cannot stand in for it"
        elif options.layers == ALL:
            reason = f"its class turns each layer by a base of its own, not by {options.rope}; give --rope ntk or drope"
        else:
            reason = f"no class rotates single layers by {options.rope}; leave --layers out"
        raise UnsupportedError(f"{kind}: {reason}")
    if any(rope_parameters(config, layer).get("rope_type") == "dynamic" for layer in layers):  # counts from the length
        raise UnsupportedError(f"{kind}: its RoPE is stretched already (dynamic); convert the model from before that")
    factor = stretch(trained, options)
    if kind == "smollm3":
        old = list(config.no_rope_layers)
        return {"no_rope_layers": [0 if layer in chosen else old[layer] for layer in range(len(old))]}
    thetas = list(config.layer_rope_theta)
    for layer in chosen:
        dims = family.rotary_dims(config, layer)
        thetas[layer] = 0 if options.rope == "drope" else ntk_theta(thetas[layer], factor, dims)
    return {"layer_rope_theta": thetas}


def _reads_parameters(config: Config) -> bool:
    """Whether a class builds its frequencies from ``rope_parameters``."""
    bases = (base for base in causal_lm_class(config).__mro__ if ".models." in base.__module__)
    modules = {inspect.getmodule(base) for base in bases}  # of Rehead's classes also that of what they derive from
    return any(module is not None and "ROPE_INIT_FUNCTIONS" in inspect.getsource(module) for module in modules)


def _flat(raw: Mapping[str, Any], config: Config, layer: int) -> Mapping[str, Any]:
    """The raw parameters of one layer."""
    parameters = raw.get("rope_parameters") or {}
    kinds = getattr(config, "layer_types", None)
    return parameters.get(kinds[layer], parameters) if kinds else parameters


def _check(layer: int, got: Mapping[str, Any], want: Mapping[str, Any], kind: str) -> None:
    """Refuse a class that reads something else than was written."""
    wrong = [key for key, value in want.items() if got.get(key) != value]
    if wrong:
        raise UnsupportedError(f"{kind}: its config does not keep {wrong[0]} of layer {layer}; patch the live model")
