"""A raw ``config.json`` as transformers reads it: which config class, which model class, without remote code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rehead.errors import UnsupportedError
from rehead.models.families.spec import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_config(raw: Mapping[str, Any], name: str) -> Config:
    """A raw ``config.json`` as transformers' config object, without remote code.

    Raises:
        UnsupportedError: no ``model_type``, one that the installed transformers lacks, or values its class refuses.
    """
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
        raise UnsupportedError(f"{name}: config.json is not a valid {model_type} config ({reason}); mend it") from None


def _plain_floats(value: Any) -> Any:
    """Undo what transformers writes into JSON for infinities and NaN: ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(item) for key, item in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


def with_older_rope(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A raw config that also has RoPE under the names of transformers 4 and of other engines: ``rope_theta``,
    ``rope_scaling``, ``partial_rotary_factor`` and, where windows rotate otherwise, ``rope_local_base_freq``.

    Without them such a reader takes its default theta, unsaid. They are left out where the class would no longer read
    the same out of the config, or where the older names cannot say it.
    """
    given = raw.get("rope_parameters")
    if not isinstance(given, dict):
        return dict(raw)
    older: dict[str, Any] = {}
    kinds = {kind for kind, value in given.items() if isinstance(value, dict)}
    if kinds:
        full, windows = (given.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        split = raw.get("model_type") == "gemma3_text"
        same = raw.get("model_type") == "olmo3" and full.get("rope_theta") == windows.get("rope_theta")
        if not (split or same) or windows.get("rope_type", "default") != "default":
            return dict(raw)
        older = {"rope_local_base_freq": windows.get("rope_theta")} if split else {}
        given = full
    scaling = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type") == "longrope":  # whose older form has three fields, not four
        older["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings", None)
        scaling = {"type": "longrope", **{k: v for k, v in scaling.items() if k != "rope_type"}}
    older |= {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if given.get(key) is not None}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        older["rope_scaling"] = scaling
    result = {**raw, **{key: value for key, value in older.items() if value is not None and raw.get(key) is None}}
    try:
        same = resolve_config(result, name).rope_parameters == resolve_config(raw, name).rope_parameters
    except (UnsupportedError, AttributeError):
        same = False
    return result if same else dict(raw)


def json_floats(value: Any) -> Any:
    """Infinities and NaN as transformers writes them: JSON has none."""
    if isinstance(value, dict):
        return {key: json_floats(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    return [json_floats(item) for item in value] if isinstance(value, list) else value


def causal_lm_class(config: Config) -> type[PreTrainedModel]:
    """The class that ``AutoModelForCausalLM`` loads for a config, or ``AutoModelForSeq2SeqLM`` for an encoder-decoder.

    Raises:
        UnsupportedError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    found = auto._model_mapping.get(type(config), None)
    if found is None:
        raise UnsupportedError(f"model type {config.model_type!r} has no causal language model class in transformers")
    if not isinstance(found, (tuple, list)):
        return found  # type: ignore[no-any-return]
    named = {choice.__name__: choice for choice in found}
    return next((named[name] for name in getattr(config, "architectures", None) or () if name in named), found[0])
