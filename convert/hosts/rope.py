"""Rotary positions that a host lacks."""

from __future__ import annotations

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
