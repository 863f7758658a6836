"""Find the family of a checkpoint by its config and tensor names, or refuse it and say why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rehead.errors import UnsupportedError
from rehead.models.families.guess import guess_family
from rehead.models.families.parallel import as_derived, base_type
from rehead.models.families.refusals import REFUSALS
from rehead.models.families.seq2seq import SEQ2SEQ
from rehead.models.families.spec import Config, Family
from rehead.models.families.table import FAMILIES

# Parts of a config that make a model multimodal or a compound.
_OTHER_TOWERS = ("vision_config", "audio_config", "image_config", "speech_config", "depth_decoder_config")


def table_entry(config: Config) -> Family | None:
    """The table's family of a resolved config's type, or of the type that it derives from; None for other types."""
    return FAMILIES.get(base_type(str(config.model_type)))


def resolve_family(config: Config, tensors: Mapping[str, Any]) -> Family:
    """The family that reads a checkpoint.

    Args:
        config: a resolved transformers config.
        tensors: the checkpoint's tensors by name; each value has a ``shape``. Only names and shapes are used.

    Returns:
        The table's entry, or for an unknown model type with the usual names a guess with ``guessed`` set, which the
        caller must verify numerically. Prefixes are the class's: see :func:`with_checkpoint_prefix`.

    Raises:
        UnsupportedError: known and refused, encoder-only, encoder-decoder, multimodal, attention-free, or an unknown
            layout; one line with the reason and the remedy.
    """
    refuse_type(config)
    model_type = config.model_type
    if (family := table_entry(config)) is not None:
        return family if base_type(model_type) == model_type else as_derived(family, model_type)
    return SEQ2SEQ.get(model_type) or guess_family(config, tensors)


def refuse_type(config: Config) -> None:
    """Refuse model types that cannot be converted, by the config alone; raises as :func:`resolve_family`."""
    model_type = config.model_type
    if model_type not in REFUSALS and (differing := getattr(config, "per_layer_attributes", None)):
        raise UnsupportedError(
            f"{model_type}: its layers differ in {', '.join(sorted(differing))} (per_layer_config), and Rehead knows "
            "one layout for all of them only; give a model whose layers are alike"
        )
    if base_type(model_type) in FAMILIES or model_type in SEQ2SEQ:
        return
    reason = _known_reason(config) or _structural_reason(config)
    if reason is not None:
        raise UnsupportedError(f"{model_type}: {reason}")


def with_checkpoint_prefix(family: Family, tensors: Mapping[str, Any]) -> Family:
    """The family with the layer prefix that this checkpoint uses.

    A base model saved alone has no ``model.`` before its layers, and some releases use another name; transformers loads
    all of them. If none fits, the family is returned unchanged.
    """
    bare = family.layer.split(".", 1)[1]
    for layer in (family.layer, *family.layer_aliases, bare):
        start = layer.split("{i}")[0]
        if any(name.startswith(start) for name in tensors):
            return replace(family, layer=layer)
    return family


def _known_reason(config: Config) -> str | None:
    refusal = REFUSALS.get(config.model_type)
    return refusal.reason if refusal else None


def _structural_reason(config: Config) -> str | None:
    """Why a model type outside both tables cannot be converted; None if its config shows no reason."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder; give T5 or a decoder-only causal language model"
    towers = [name for name in _OTHER_TOWERS if getattr(config, name, None) is not None]
    if towers or getattr(config, "text_config", None) is not None:
        return _multimodal(config)
    if not _is_causal(config):
        return (
            "is encoder-only, no text generator, or a part of a larger model (transformers has no causal language "
            "model class for it alone); give a decoder-only model"
        )
    if not getattr(config, "num_attention_heads", None):
        return "has no attention heads in its config, so there are none to convert; give a model with attention"
    return None


def _multimodal(config: Config) -> str:
    """Why a multimodal model is refused, and how to convert its language model if that is possible."""
    text = getattr(config, "text_config", None)
    kind = getattr(text, "model_type", None)
    if kind in FAMILIES and _is_causal(text):
        return (
            f"is multimodal; convert its language model ({kind}) alone: load its language_model and lm_head into "
            "AutoModelForCausalLM.from_config(config.text_config), save_pretrained that, and give its folder"
        )
    reason = "transformers has no class for it alone that generates text"
    if kind is not None and _is_causal(text):
        reason = (_known_reason(text) or "it is not in Rehead's table").split(";")[0]
    name = f" ({kind})" if kind else ""
    return f"is multimodal, and its language model{name} cannot be converted alone: {reason}; give a text-only model"


def _is_causal(config: Config) -> bool:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping.get(type(config), None) is not None
