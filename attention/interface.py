"""The attention function that transformers calls under ``rehead_tiled``, and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface

from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.attention.latent import LATENT, attend_latents
from rehead.attention.layer import LAYER
from rehead.attention.mask import TiledMask
from rehead.attention.ring import WINDOW, fitted, ring_of, with_file_window
from rehead.errors import UnsupportedError, UsageError
from rehead.models.modeling.modeling_rehead_cache import NAMES, NEW

NAME = "rehead_tiled"

IGNORED = frozenset(
    {
        # Positions, caches and bookkeeping that have done their work before attention is called.
        *NAMES, "use_cache", "position_ids", "cache_position", "position_embeddings", "is_updated", "layer_idx",
        "output_hidden_states", "return_dict", "num_items_in_batch", "logits_to_keep",
        "output_router_logits", "return_tensors", "labels", "shift_labels", "token_type_ids", "mm_token_type_ids",
        "training", "max_length_q", "max_length_k", "inputs_embeds", "input_ids",
        # Speech and vision encoders hand these down to every layer.
        "encoder_hidden_states", "encoder_attention_mask", "past_key_values_length",
    }
)  # fmt: skip
"""Keyword arguments that do not change what attention computes."""


def _segments(cu_seq_lens: Tensor, length: int, batch: int) -> Tensor:
    """Which packed sequence each of ``length`` tokens belongs to, int32 ``[B, length]``, from cumulative lengths."""
    token = torch.arange(length, device=cu_seq_lens.device)
    ids = torch.searchsorted(cu_seq_lens[1:].contiguous().to(token.dtype), token, right=True)
    return ids.to(torch.int32)[None].expand(batch, -1)


def _no_mask(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, window: int | None) -> TiledMask:
    """The mask that transformers means by None: top-left causal for several queries, everything for one."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    n_query, n_key = query.shape[2], key.shape[2]
    # A single query is at the last position.
    offset = n_key - 1 if n_query == 1 else 0
    window = window if causal and n_query > 1 else None
    return TiledMask(query.shape[0], n_query, n_key, query.device, causal=causal, q_offset=offset, window=window)


def _check_window(mask: TiledMask, window: int | None, module: nn.Module) -> None:
    """Refuse a window argument that would hide more than the mask, which decides what is seen."""
    if window is None or mask.dense is not None or not mask.causal or mask.kv_length <= window:
        return
    if mask.window is None and mask.chunk is None and mask.q_segments is None:
        raise UnsupportedError(
            f"{type(module).__name__} asks for a window of {window} but its mask has none; "
            "the two must agree, load the model with attn_implementation='eager'"
        )


def _select(indices: Tensor, rules: dict[str, Any], mask: TiledMask | None, n_key: int) -> dict[str, Any]:
    """Rules that also hide all keys but those an indexer selected for each row, as a dense mask."""
    selected = torch.zeros(*indices.shape[:2], n_key, dtype=torch.bool, device=indices.device)
    selected = selected.scatter(-1, indices.long(), True)[:, None]
    if mask is not None:
        return {"causal": False, "bias": selected & mask.materialize()}
    bias = rules["bias"]
    return {"causal": False, "bias": selected & bias if bias.dtype == torch.bool else _join(selected, bias)}


def _as_bias(mask: Tensor, key: Tensor) -> Tensor:
    """A user's own 4-D mask, cut to the present keys as in eager attention."""
    if mask.ndim != 4:
        raise UnsupportedError(
            f"an attention mask of {mask.ndim} dimensions reached the attention layer; pass a 2-D or a 4-D mask"
        )
    return mask[..., : key.shape[2]] if mask.shape[-1] > 1 else mask


def _column_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, rules: dict[str, Any], mask: TiledMask | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(key, value, rules) for sinks that differ between tokens, ``[B, H, Sq, 1]``: one more zero key with a bias."""
    bias = rules.get("bias")
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros((), dtype=sinks.dtype, device=sinks.device).where(bias, float("-inf"))
    if mask is not None:
        seen = mask.materialize()
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        bias = torch.zeros(shape, dtype=sinks.dtype, device=sinks.device) if bias is None else bias.expand(shape)
        bias = bias.masked_fill(~seen, float("-inf"))
    assert bias is not None
    bias = torch.cat([bias.expand(*sinks.shape[:3], -1), sinks.to(bias.dtype)], dim=-1)
    key, value = (torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (key, value))
    return key, value, {"causal": False, "bias": bias}


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TiledMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' ``AttentionInterface``; every argument is honoured or refused.

    Args:
        module: the calling attention layer.
        query: ``[B, H, Sq, D]``.
        key, value: ``[B, K, Skv, D]`` and ``[B, K, Skv, Dv]``.
        attention_mask: a :class:`TiledMask`, a 4-D mask (bool: True is visible; float: added), or None.
        scaling: factor of the scores, ``D ** -0.5`` if None.
        dropout: must be 0.
        is_causal: for a missing mask only; the module's ``is_causal`` if None.
        sliding_window: must agree with the mask; for a missing mask it is the window.
        softcap: ``softcap * tanh(score / softcap)``.
        s_aux: attention sinks, ``[H]``.
        sinks: attention sinks of each token, ``[B, H, Sq, 1]`` (or ``[H]``).
        position_bias: added to the scores, broadcastable to ``[B, H, Sq, Skv]``.
        cu_seq_lens_q, cu_seq_lens_k: int ``[N + 1]``, cumulative lengths of packed sequences.
        indices: int ``[B, Sq, top_k]``, the only keys that each row may see (learned sparse attention).
        **kwargs: names in :data:`IGNORED`, or values of None or False; anything else is refused.

    Returns:
        ``[B, Sq, H, Dv]`` and None in place of the attention weights.

    Raises:
        UnsupportedError: an argument that is not implemented.
        UsageError: the caller asks for attention weights.
    """
    where = type(module).__name__
    if torch.jit.is_tracing():
        raise UnsupportedError(
            f"{where} is traced by torch.jit.trace, which would keep this input's padding mask as a constant; "
            "use torch.compile or torch.export, or revert the patch first"
        )
    if kwargs.pop("output_attentions", False):
        raise UsageError(NO_WEIGHTS)
    if dropout:
        raise UnsupportedError(
            f"{where} asks for attention dropout {dropout}, which tiled attention does not have; "
            "call model.eval() or set the config's attention dropout to 0"
        )
    for name, value_of_name in kwargs.items():
        # A layer's cache has done its work here; what continuous batching hands down by the same name has not.
        paged = name == NEW and not isinstance(value_of_name, Cache)
        if (name not in IGNORED or paged) and value_of_name is not None and value_of_name is not False:
            raise UnsupportedError(
                f"{where} passes {name!r} to attention, which rehead_tiled does not implement; "
                "load the model with attn_implementation='eager'"
            )
    ring = ring_of(module)
    if ring is not None:
        if position_bias is not None or indices is not None:
            raise UnsupportedError(f"{where} has a bias by position, which a cache that keeps a window does not have")
        attention_mask = fitted(attention_mask, ring, query, key)
    mask = attention_mask if isinstance(attention_mask, TiledMask) else None
    rules: dict[str, Any]
    if attention_mask is not None and mask is None:
        rules = {"causal": False, "bias": _as_bias(attention_mask, key)}  # type: ignore[arg-type]
    else:
        if mask is None:
            mask = _no_mask(module, query, key, is_causal, sliding_window)
        else:
            _check_window(mask, sliding_window, module)
        mask = _fit(mask, key, where)
        if cu_seq_lens_q is not None:
            cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
            batch = query.shape[0]
            mask = mask.with_segments(
                _segments(cu_seq_lens_q, query.shape[2], batch), _segments(cu_seq_lens_k, key.shape[2], batch)
            )
        rules = mask.rules()
    if indices is not None:
        rules = _select(indices, rules, mask, key.shape[2])
    if position_bias is not None:
        rules["bias"] = _join(rules.get("bias"), position_bias[..., : key.shape[2]])
    if sinks is not None and sinks.ndim == 4:
        key, value, rules = _column_sinks(query, key, value, sinks, rules, mask)
        sinks = None
    head_sinks = s_aux if s_aux is not None else sinks
    if head_sinks is not None:
        rules["sinks"] = head_sinks.reshape(-1)
    layer = getattr(module, LAYER, None)
    compute = attend if layer is None else layer.attend
    rules["softcap"] = softcap
    if getattr(module, LATENT, False):  # key and value are the latents and the rotated key beside them
        return attend_latents(module, query, key, value, scaling, rules, compute), None
    call = AttentionCall(query, key, value, scale=scaling, **rules)
    return compute(with_file_window(module, call) if WINDOW in module.__dict__ else call), None


NO_WEIGHTS = (
    "output_attentions=True asks for attention weights, which tiled attention never forms; "
    "call model.set_attn_implementation('eager') for that run, or leave output_attentions out"
)


def _fit(mask: TiledMask, key: Tensor, where: str) -> TiledMask:
    """The mask cut to the number of keys, for one made for a longer cache; refuses a shorter one."""
    if mask.kv_length == key.shape[2]:
        return mask
    if mask.kv_length > key.shape[2]:
        return mask[:, :, :, : key.shape[2]]
    raise UnsupportedError(
        f"{where} has {key.shape[2]} keys but its mask describes {mask.kv_length}; "
        "pass an attention mask that covers the whole cache"
    )


def _join(mask: Tensor | None, bias: Tensor) -> Tensor:
    """One additive bias from a dense mask and a position bias."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return mask + bias


def register() -> None:
    """Register ``attn_implementation="rehead_tiled"`` with transformers: before it is installed, and on import of
    :mod:`rehead.patches` for models that are loaded by that name."""
    from rehead.attention.mask_function import tiled_mask

    AttentionInterface.register(NAME, tiled_attention)
    AttentionMaskInterface.register(NAME, tiled_mask)
