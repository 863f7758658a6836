"""Read a raw ``config.json`` as transformers does: find its config class and model class, without remote code."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rehead.errors import UnsupportedError
from rehead.models.families.known import KnownConfig, known_config
from rehead.models.families.spec import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MOST_LAYERS = 10_000


def resolve_config(raw: Mapping[str, Any], name: str) -> Config:
    """transformers' config object for a raw ``config.json``, without remote code.

    Raises:
        UnsupportedError: no ``model_type``, one that the installed transformers lacks, or values its class refuses.
    """
    if key := _too_deep(raw):
        raise UnsupportedError(f"{name}: config.json: {key} is more than {_MOST_LAYERS:,}, which no model has; fix it")
    # Once transformers is there, asking it costs nothing.
    if "transformers" not in sys.modules and (known := known_config(raw)) is not None:
        return known
    from transformers import CONFIG_MAPPING

    model_type = raw.get("model_type")
    if model_type == "mistral" and "layer_types" in raw:
        model_type = "ministral"  # as AutoConfig has it: Mistral's own class knows one window for all layers
    if not isinstance(model_type, str):
        raise UnsupportedError(f"{name}: config.json names no model_type; save the model with transformers first")
    if model_type not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise UnsupportedError(
                f"{name}: model type {model_type!r} needs remote code, which Rehead never runs; "
                "use a checkpoint in transformers' own format"
            )
        raise UnsupportedError(
            f"{name}: model type {model_type!r} is not in the installed transformers; upgrade transformers"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_plain_floats({**raw, "model_type": model_type}))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnsupportedError(f"{name}: config.json is not a valid {model_type} config ({reason}); fix it") from None


def _too_deep(raw: Mapping[str, Any]) -> str:
    """A key with so many layers that building them, even without weights, would never end; else nothing."""
    for key, value in raw.items():
        if isinstance(value, Mapping) and (inner := _too_deep(value)):
            return f"{key}.{inner}"
        if str(key).endswith(("layers", "n_layer")) and isinstance(value, int) and value > _MOST_LAYERS:
            return key
    return ""


def _plain_floats(value: Any) -> Any:
    """Undo what transformers writes into JSON for infinities and NaN: ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(item) for key, item in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


def with_older_rope(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A raw config that also has RoPE under its older names, for transformers 4 and other engines.

    The names are ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and, where sliding-window layers rotate
    differently, ``rope_local_base_freq``. Without them such a reader silently uses its default theta. They are left out
    where the config would then be read differently, or where they cannot express the parameters.
    """
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict):
        return dict(raw)
    older: dict[str, Any] = {}
    kinds = {kind for kind, value in rope.items() if isinstance(value, dict)}
    if kinds:
        full, windows = (rope.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        split = raw.get("model_type") == "gemma3_text"
        same = raw.get("model_type") == "olmo3" and full.get("rope_theta") == windows.get("rope_theta")
        if not (split or same) or windows.get("rope_type", "default") != "default":
            return dict(raw)
        older = {"rope_local_base_freq": windows.get("rope_theta")} if split else {}
        rope = full
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    older |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    forms = [older | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})]
    if scaling.get("rope_type") == "longrope":  # whose form in Phi 3 has three fields, not four
        moved = ("rope_type", "original_max_position_embeddings")
        three = {"type": "longrope", **{k: v for k, v in scaling.items() if k not in moved}}
        original = scaling.get("original_max_position_embeddings")
        forms.insert(0, older | {"rope_scaling": three, "original_max_position_embeddings": original})
    for form in forms:
        result = {**raw, **{key: value for key, value in form.items() if value is not None and raw.get(key) is None}}
        try:
            if resolve_config(result, name).rope_parameters == resolve_config(raw, name).rope_parameters:
                return result
        except (UnsupportedError, AttributeError):
            continue
    return dict(raw)


def json_floats(value: Any) -> Any:
    """Infinities and NaN as transformers writes them: JSON has none."""
    if isinstance(value, dict):
        return {key: json_floats(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    return [json_floats(item) for item in value] if isinstance(value, list) else value


def own_config(config: Config) -> Any:
    """transformers' own object, where a record stands for it."""
    return config.real() if isinstance(config, KnownConfig) else config


def causal_lm_class(config: Config) -> type[PreTrainedModel]:
    """The class that ``AutoModelForCausalLM`` loads for a config, or ``AutoModelForSeq2SeqLM`` for an encoder-decoder.

    Raises:
        UnsupportedError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = own_config(config)
    auto: Any = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    classes = auto._model_mapping.get(type(config), None)
    if classes is None:
        raise UnsupportedError(f"model type {config.model_type!r} has no causal language model class in transformers")
    if not isinstance(classes, (tuple, list)):
        return classes  # type: ignore[no-any-return]
    named = {each.__name__: each for each in classes}
    return next((named[name] for name in getattr(config, "architectures", None) or () if name in named), classes[0])
