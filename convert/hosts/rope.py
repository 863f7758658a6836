"""Rotary positions from one config to another."""

from __future__ import annotations

import math
from typing import Any

from rehead.models.rewrite import Builder


def refuse_rope(build: Builder, spanning: bool) -> None:
    """Refuse a GPT-NeoX whose rotation the host does not have.

    Args:
        spanning: the host rotates pairs over the whole head of which some stand still (``rope_type: proportional``).

    Raises:
        UnsupportedError: such pairs where it does not, or an odd number of dimensions.
    """
    parameters, size = build.config.rope_parameters, build.source.head_dim(build.config)
    host = build.target.model_type
    if parameters.get("rope_type") == "proportional":
        if not spanning:
            raise build.refuse(f"its rotary pairs span the head and some stand still, which {host} does not do")
    elif (dims := int(size * parameters.get("partial_rotary_factor", 1.0))) % 2:
        raise build.refuse(f"its frequencies are those of {dims} dimensions, an odd number, which {host} does not have")


def rope_fields(parameters: dict[str, Any], dims: int, head_dim: int) -> dict[str, Any]:
    """Config keys for RoPE over the first ``dims`` of ``head_dim``.

    Both as ``rope_parameters`` and under the older names, for whoever reads a ``config.json`` without transformers.
    """
    if parameters.get("rope_type") == "proportional":  # pairs span the head, and its factor says how many of them turn
        return {"rope_parameters": dict(parameters), "rope_theta": parameters["rope_theta"]}
    factor = dims / head_dim
    if int(head_dim * factor) != dims:  # classes round down, and so may the quotient
        factor = math.nextafter(factor, 1.0)
    parameters = {"rope_type": "default", **parameters, "partial_rotary_factor": factor}
    fields: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "partial_rotary_factor": factor,
    }
    return fields
