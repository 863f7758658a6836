"""How the rotary pairs of a layer turn, and turning queries and keys that are rotated already to other positions.

Rotations add up: a query rotated for position p and turned by d more positions is one rotated for p + d. So attention
can be given other positions than the model gave it, with caches that hold keys as the model rotated them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.families.resolve import table_entry
from rehead.models.families.spec import CHANGING, Config, rope_parameters

_AHEAD = 4096
"""Places by which remembered angles grow at once."""
_SLAB = 512
"""Tokens that are turned at once on a CPU."""


def rope_kind(config: Config, layer: int) -> str:
    """The kind of RoPE of a layer, by transformers' name; ``"default"`` where the config names none."""
    parameters = rope_parameters(config, layer)
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def frequencies(config: Config, layer: int, dims: int) -> Tensor:
    """Radians per token that each rotary pair of a layer turns for short texts, float32 [dims / 2].

    Args:
        config: resolved, of a model that rotates.
        layer: index of the layer.
        dims: dimensions of a head that rotate.
    """
    parameters, kind = rope_parameters(config, layer), rope_kind(config, layer)
    if kind == "default":
        by_layer = getattr(config, "layer_rope_theta", None)
        theta = by_layer[layer] if by_layer else parameters.get("rope_theta") or getattr(config, "rope_theta", None)
        return 1.0 / (float(theta or 10000.0) ** (torch.arange(0, dims, 2, dtype=torch.float) / dims))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = getattr(config, "layer_types", None) or ()
    nested = bool(kinds) and kinds[layer] in (getattr(config, "rope_parameters", None) or {})
    turned: Tensor = ROPE_INIT_FUNCTIONS[kind](config, None, **({"layer_type": kinds[layer]} if nested else {}))[0]
    return turned.cpu()


@dataclass(frozen=True, eq=False)
class Turn:
    """The rotary pairs of one layer's heads.

    Attributes:
        angles: radians per token that each pair turns, float64 [P].
        interleaved: pairs are neighbouring dimensions; otherwise the halves of the first 2 P dimensions.
        memory: what :meth:`grouped` keeps, by group and device.
    """

    angles: Tensor
    interleaved: bool = False
    memory: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def by(self, states: Tensor, steps: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Queries or keys ``[..., S, D]`` turned by so many positions more; gradients pass.

        Args:
            states: rotated already, for whatever positions.
            steps: integer ``[S]``, or any shape that broadcasts over ``[..., S]``; may be negative. Or :meth:`waves` of
                them.
        """
        cos, sin = self.waves(steps.to(states.device)) if isinstance(steps, Tensor) else steps
        long = cos.ndim == 2 and len(cos) > _SLAB and states.device.type == "cpu"
        if long and not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):  # in pieces that a CPU's cache holds
            whole = torch.empty_like(states)
            for at in range(0, len(cos), _SLAB):
                piece = slice(at, at + _SLAB)
                whole[..., piece, :] = self._turned(states[..., piece, :], cos[piece], sin[piece])
            return whole
        return self._turned(states, cos, sin)

    def _turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        count = len(self.angles)
        pairs = states[..., : 2 * count].float()
        if self.interleaved:
            first, second = pairs[..., 0::2], pairs[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        else:
            first, second = pairs[..., :count], pairs[..., count:]
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        turned = turned.to(states.dtype)
        return turned if 2 * count == states.shape[-1] else torch.cat([turned, states[..., 2 * count :]], -1)

    def waves(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(cosine, sine) of every pair's angle after so many positions, float32 ``[..., P]``."""
        angles = steps.to(torch.float64)[..., None] * self.angles.to(steps.device)
        return angles.cos().float(), angles.sin().float()

    def grouped(self, group: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """:meth:`waves` of places 0 to ``count`` moved to ``place // group``, remembered from one token to the next."""
        if torch.compiler.is_compiling():
            place = torch.arange(count, device=device)
            return self.waves(place // group - place)
        waves = self.memory.get((group, device))
        if waves is None or len(waves[0]) < count:
            with torch.inference_mode(False):  # for uses outside it too
                place = torch.arange(-(-count // _AHEAD) * _AHEAD, device=device)
                self.memory[group, device] = waves = self.waves(place // group - place)
        return waves[0][:count], waves[1][:count]


def turn_of(config: Any, layer: int) -> Turn | None:
    """The rotary pairs of a layer; None for a layer that does not rotate.

    Raises:
        UnsupportedError: an unknown layout, frequencies that change with the length, or a norm after the rotation that
            a turn does not pass through.
    """
    kind = str(config.model_type)
    family = table_entry(config)
    if family is None:
        raise UnsupportedError(f"{kind}: how its heads rotate is not known, so positions cannot be changed after it")
    dims = family.rotary_dims(config, layer)
    if not dims or family.pairing == "none":
        return None
    rope = rope_kind(config, layer)
    if rope in CHANGING or rope == "proportional":
        raise UnsupportedError(f"{kind}: its RoPE ({rope}) has no fixed turn of each pair; use the model before that")
    if family.norm_after_rotation and family.norm_of(config, layer) not in ("none", "l2"):
        raise UnsupportedError(f"{kind}: norms queries and keys after rotating them, so they cannot be turned further")
    return Turn(frequencies(config, layer, dims).double(), family.pairing == "interleaved")
