"""A stored latent layer read back, to see that nothing was lost on the way into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rehead.variants.latent.export import _rope_order
from rehead.variants.latent.gauge import NORM_EPS
from rehead.variants.latent.heads import LatentHeads


def out_of_lane(down: Tensor, norm: Tensor, eps: float = NORM_EPS) -> Tensor:
    """The latent's rows at their natural scale, of rows and a norm's weight as stored."""
    return down * (norm / eps**0.5).reshape(-1, *[1] * (down.ndim - 1))


def latent_heads(
    tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], frequencies: Tensor, writers: float = 1.0
) -> LatentHeads:
    """The inverse of :func:`layer_tensors`: a stored layer at its natural scale, the norm taken as a constant.

    Args:
        config: as :func:`latent_config` makes it.
        frequencies: radians per token, [P].
    """
    read = {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}
    rank, turning, still = (config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    heads, values = config["num_attention_heads"], config["v_head_dim"]
    back = _rope_order(turning, config["rope_interleave"], frequencies.device).argsort()
    queries, query_bias = _stored_queries(read)
    queries = queries.unflatten(0, (heads, -1))
    if query_bias is not None:
        query_bias = query_bias.unflatten(0, (heads, -1))
    rows, norm = read["kv_a_proj_with_mqa.weight"], read["kv_a_layernorm.weight"]
    up = read["kv_b_proj.weight"].unflatten(0, (heads, -1))
    bias, o_bias = read.get("kv_a_proj_with_mqa.bias"), read.get("o_proj.bias")
    return LatentHeads(
        down=out_of_lane(rows[:rank], norm),
        rope=rows[rank:][back],
        q_nope=queries[:, :still],
        q_rope=queries[:, still:][:, back],
        key_up=up[:, :still],
        value_up=up[:, still:],
        o=(read["o_proj.weight"] / writers).unflatten(1, (heads, values)),
        frequencies=frequencies,
        scaling=(still + turning) ** -0.5,
        q_nope_bias=None if query_bias is None else query_bias[:, :still],
        q_rope_bias=None if query_bias is None else query_bias[:, still:][:, back],
        down_bias=None if bias is None else out_of_lane(bias[:rank], norm),
        rope_bias=None if bias is None else bias[rank:][back],
        o_bias=None if o_bias is None else o_bias / writers,
    )


def _stored_queries(read: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the query path as :func:`_queries` stores it."""
    if "q_proj.weight" in read:
        return read["q_proj.weight"], None
    gain = read["q_a_proj.bias"][-1] * read["q_a_layernorm.weight"][-1] / NORM_EPS**0.5
    wide = read["q_b_proj.weight"] * gain
    return wide[:, :-1], wide[:, -1]
