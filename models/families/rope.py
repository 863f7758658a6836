"""Rotary positions as config keys."""

from __future__ import annotations

import math
from typing import Any


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
