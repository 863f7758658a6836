"""How a model's rotary pairs turn, read off its config."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.families.spec import rope_parameters
from rehead.models.model import Model

#: Kinds of RoPE whose frequencies are the same at every length and which scale nothing else.
_FIXED = ("default", "linear", "llama3")


def angles_of(model: Model) -> Tensor:
    """Turn of each rotary pair from one token to the next in radians, float64 [P]; the same in every layer.

    Raises:
        UnsupportedError: layers differ or do not rotate, or the turn depends on the length of the text.
    """
    config, family = model.config, model.family
    kinds = {(family.rotary_dims(config, layer), str(rope_parameters(config, layer))) for layer in model.layers}
    name = model.source.id
    if len(kinds) != 1:
        raise UnsupportedError(f"{name}: its layers rotate differently, for which latent hosts have no place")
    dims = family.rotary_dims(config, model.layers[0])
    if family.pairing == "none" or not dims:
        raise UnsupportedError(f"{name}: its heads do not rotate, and a latent's shared key must; keep its attention")
    parameters = rope_parameters(config, model.layers[0])
    kind = parameters.get("rope_type", "default")
    if kind not in _FIXED:
        raise UnsupportedError(
            f"{name}: its RoPE ({kind}) changes with the length of the text or scales the scores, which a latent's "
            f"shared key cannot do; convert a model with {', '.join(_FIXED)}"
        )
    if kind == "default":
        theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
        return theta ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.double()
