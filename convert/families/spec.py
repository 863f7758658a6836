"""What a family is: where an architecture keeps its attention heads, as data.

Nothing here reads a weight. :mod:`rehead.convert.families.table` holds one :class:`Family` for each ``model_type``;
:mod:`rehead.convert.families.layouts` turns a layer's tensors into :class:`~rehead.convert.heads.Heads` and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# A resolved config: a transformers `PretrainedConfig`, read with getattr so that defaults and aliases count.
Config = Any

Packing = Literal["separate", "blocks", "groups"]
"""How query, key and value rows share tensors.

``separate``: three tensors. ``blocks``: one tensor, all queries, then all keys, then all values.
``groups``: one tensor, for each KV head its query heads, then its key, then its value; with one query head to a KV head
this is the per-head interleaving of GPT-NeoX and BLOOM, with one KV head it equals ``blocks``.
"""

Pairing = Literal["half", "interleaved", "none"]
"""Which two dimensions of a head RoPE rotates together: ``(i, i + r/2)``, ``(2i, 2i + 1)``, or no rotation at all."""

KeyNorm = Literal["none", "rms", "layer", "rms_span", "layer_own", "l2"]
"""What normalises queries and keys after projection.

``rms``: RMS over each head, one weight [head_dim] for all heads (Qwen3, Gemma 3). ``layer``: the same with LayerNorm
(Phi, Persimmon). ``rms_span``: RMS over all heads together, a weight for each channel (OLMo 2). ``layer_own``: LayerNorm
over each head with a weight for each head (Cohere, StableLM). ``l2``: RMS over each head without a weight (Llama 4).
"""


@dataclass(frozen=True)
class Names:
    """Tensor names of one attention module, below the module's own prefix and without ``.weight`` or ``.bias``.

    For a fused packing, ``query`` names the fused tensor and ``key`` and ``value`` are unused.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"


def rotary_none(config: Config, layer: int) -> int:
    """No rotary dimensions: learned, ALiBi or no positions."""
    return 0


def rotary_all(config: Config, layer: int) -> int:
    """Every dimension of the head rotates."""
    return head_dim(config)


def rotary_partial(config: Config, layer: int) -> int:
    """The first ``partial_rotary_factor`` of the head rotates, rounded down as the classes do."""
    factor = getattr(config, "partial_rotary_factor", None)
    if factor is None:
        factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return int(head_dim(config) * factor)


def head_dim(config: Config) -> int:
    """``head_dim`` where the config has one, else ``hidden_size / num_attention_heads``."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else config.hidden_size // config.num_attention_heads


def kv_heads(config: Config) -> int:
    """``num_key_value_heads``, which defaults to one KV head for each query head."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def set_kv_heads(raw: dict[str, Any], kv: int) -> None:
    """The usual config change: ``num_key_value_heads = kv``."""
    raw["num_key_value_heads"] = kv


@dataclass(frozen=True)
class Family:
    """One architecture's attention layout.

    Attributes:
        model_type: transformers' ``model_type``.
        layer: prefix of decoder layer ``{i}`` in the full model, e.g. ``"model.layers.{i}."``.
        attention: the attention module below the layer, e.g. ``"self_attn."``.
        packing: how q, k and v share tensors.
        transposed: weights are stored [in, out] (GPT-2's ``Conv1D``).
        names: tensor names.
        key_norm: what normalises keys; decides which changes of basis leave the function alone.
        pairing: rotary pairing.
        rotary_dims: (config, layer) -> how many leading dimensions of the head rotate; 0 in layers without RoPE.
        num_heads, num_kv_heads, head_dim: read the counts off a resolved config.
        set_kv: writes the new count into a raw config.json dict.
        block: "serial" or "parallel", or a function of the config, for `inspect`.
        post_norm: the attention's output passes a norm before it joins the residual stream.
        residual_scale: config -> factor on the attention's output before it joins the residual stream.
        refusal: (config, kv_heads) -> why this class cannot hold the result, or None.
        has_attention: (config, layer) -> whether this layer is an attention layer (hybrids interleave others).
        notes: shown by ``rehead families``.
    """

    model_type: str
    layer: str = "model.layers.{i}."
    attention: str = "self_attn."
    packing: Packing = "separate"
    transposed: bool = False
    names: Names = field(default_factory=Names)
    key_norm: KeyNorm | Callable[[Config], KeyNorm] = "none"
    pairing: Pairing = "half"
    rotary_dims: Callable[[Config, int], int] = rotary_all
    num_heads: Callable[[Config], int] = lambda config: int(config.num_attention_heads)
    num_kv_heads: Callable[[Config], int] = kv_heads
    head_dim: Callable[[Config], int] = head_dim
    set_kv: Callable[[dict[str, Any], int], None] = set_kv_heads
    block: str | Callable[[Config], str] = "serial"
    post_norm: bool = False
    residual_scale: Callable[[Config], float] = lambda config: 1.0
    refusal: Callable[[Config, int], str | None] = lambda config, kv: None
    has_attention: Callable[[Config, int], bool] = lambda config, layer: True
    notes: str = ""

    def prefix(self, layer: int) -> str:
        """Full prefix of layer ``layer``'s attention tensors, e.g. ``"model.layers.3.self_attn."``."""
        return self.layer.format(i=layer) + self.attention

    def norm_of(self, config: Config) -> KeyNorm:
        """The key norm of this config (some families switch it by a config key)."""
        return self.key_norm(config) if callable(self.key_norm) else self.key_norm

    def block_of(self, config: Config) -> str:
        """Block shape of this config."""
        return self.block(config) if callable(self.block) else self.block


@dataclass(frozen=True)
class Refusal:
    """A model type that Rehead knows and declines, with the reason and what to do instead."""

    model_type: str
    reason: str


FamilyTable = Mapping[str, Family]
