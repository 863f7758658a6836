"""A family describes, as data, where an architecture keeps its attention heads.

Nothing here reads a weight. :mod:`rehead.models.families.table` has one :class:`Family` for each ``model_type``;
:mod:`rehead.models.families.layouts` turns a layer's tensors into :class:`~rehead.models.heads.Heads` and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# A resolved config: a transformers `PretrainedConfig`, read with getattr so that defaults and aliases count.
Config = Any

Packing = Literal["separate", "blocks", "groups", "quarters"]
"""How query, key and value rows share tensors.

``separate``: three tensors. ``blocks``: one tensor, all queries, then all keys, then all values.
``groups``: one tensor, for each KV head its query heads, then its key, then its value; with one query head to a KV head
this is the per-head interleaving of GPT-NeoX and BLOOM, with one KV head it equals ``blocks``.
``quarters``: one tensor in four parts, each with a quarter of the heads: queries, then values, then keys (CodeGen).
"""

Pairing = Literal["half", "interleaved", "none"]
"""Which two dimensions of a head RoPE rotates together: ``(i, i + r/2)``, ``(2i, 2i + 1)``, or no rotation at all."""

KeyNorm = Literal["none", "rms", "layer", "rms_span", "layer_own", "l2"]
"""What normalises queries and keys after projection.

``rms``: RMS over each head, one weight [head_dim] for all heads (Qwen3, Gemma 3). ``layer``: the same with LayerNorm
(Phi). ``rms_span``: RMS over all heads together, a weight for each channel (OLMo 2).
``layer_own``: LayerNorm over each head with a weight for each head (Cohere, StableLM). ``l2``: RMS over each head
without a weight (Llama 4, NanoChat). Most classes norm before RoPE, some after it: rotations of a pair commute with
either.
"""

LayerNormed = Callable[[Config, int], KeyNorm]
"""(config, layer) -> the layer's key norm."""


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


CHANGING = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the length of the text."""


def rope_parameters(config: Config, layer: int) -> dict[str, Any]:
    """The RoPE parameters of one layer; some configs hold a set for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None)
    if kinds and layer < len(kinds) and kinds[layer] in parameters:
        parameters = parameters[kinds[layer]] or {}
    return parameters


def changing_rope(config: Config) -> str | None:
    """The kind of RoPE among :data:`CHANGING` that a config names for some layer; None where all frequencies stay."""
    sets = rope_sets(getattr(config, "rope_parameters", None))
    return next((each["rope_type"] for each in sets if each.get("rope_type") in CHANGING), None)


def steady_length(config: Config) -> int | None:
    """Tokens that a model reads under one set of rotary frequencies; None where its config names no length.

    Beyond it keys in a cache are rotated for a shorter text than the next ones.
    """
    length = getattr(config, "max_position_embeddings", None)
    for each in rope_sets(getattr(config, "rope_parameters", None)):
        original = each.get("original_max_position_embeddings")
        if each.get("rope_type") in CHANGING and original:
            length = min(length or original, original)
    return int(length) if isinstance(length, int) else None


def rope_sets(parameters: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The sets within a config's RoPE parameters: one for all layers, and those of layer types, where it has them."""
    parameters = parameters or {}
    return [each for each in (parameters, *parameters.values()) if isinstance(each, Mapping)]


def rotary_partial(config: Config, layer: int) -> int:
    """The first ``partial_rotary_factor`` of the head rotates, rounded down, and then up to whole pairs."""
    parameters = rope_parameters(config, layer)
    if parameters.get("rope_type") == "proportional":
        return head_dim(config)  # the pairs span the head, and those beyond the factor turn with frequency zero
    factor = parameters.get("partial_rotary_factor")
    if factor is None:
        factor = getattr(config, "partial_rotary_factor", None)
    dims = int(head_dim(config) * (1.0 if factor is None else factor))
    return dims + dims % 2


def head_dim(config: Config) -> int:
    """``head_dim`` where the config has one, else ``hidden_size / num_attention_heads``."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else config.hidden_size // config.num_attention_heads


def kv_heads(config: Config) -> int:
    """``num_key_value_heads``, which defaults to one KV head for each query head."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def query_heads(config: Config) -> int:
    """``num_attention_heads``."""
    return int(config.num_attention_heads)


def no_scale(config: Config, layer: int) -> float:
    """The attention's output joins the residual stream as it is."""
    return 1.0


def no_refusal(config: Config, kv: int) -> str | None:
    """The class holds any number of KV heads."""
    return None


def every_layer(config: Config, layer: int) -> bool:
    """Every layer has attention."""
    return True


def no_clip(config: Config) -> float | None:
    """Nothing is clamped."""
    return None


def set_kv_heads(raw: dict[str, Any], kv: int) -> None:
    """The usual config change: ``num_key_value_heads = kv``."""
    raw["num_key_value_heads"] = kv


@dataclass(frozen=True)
class Family:
    """One architecture's attention layout.

    Attributes:
        model_type: transformers' ``model_type``.
        layer: prefix of decoder layer ``{i}`` in the full model, e.g. ``"model.layers.{i}."``.
        layer_aliases: other prefixes that released checkpoints use and transformers renames while loading.
        attention: the attention module below the layer, e.g. ``"self_attn."``.
        packing: how q, k and v share tensors.
        transposed: weights are stored [in, out] (GPT-2's ``Conv1D``).
        names: tensor names.
        key_norm: how keys are normalised; decides which changes of basis leave the function unchanged.
        norm_offset: added by the class to the stored norm weight (1 where it stores the weight minus one).
        norm_after_rotation: keys are normed after RoPE rather than before.
        pairing: which dimensions RoPE rotates together.
        rotary_dims: (config, layer) -> how many leading dimensions of the head rotate; 0 in layers without RoPE.
        num_heads, num_kv_heads, head_dim: read the counts from a resolved config.
        set_kv: writes the new count into a raw config.json dict.
        block: "serial" or "parallel", or a function of the config, for `inspect`.
        post_norm: whether the attention's output passes a norm before it joins the residual stream (MiniMax norms the
            stream itself once it has joined).
        residual_scale: (config, layer) -> factor on the attention's output before it joins the residual stream.
        refusal: (config, kv_heads) -> why this class cannot hold the result, or None.
        has_attention: (config, layer) -> whether this layer is an attention layer (hybrids interleave others).
        query_extras: names below the attention module of tensors with equal rows for every query head (sinks, output
            gates), in every spelling that checkpoints use; they change only when query heads are reordered.
        gate_in_query: the query projection holds, for each head, its query and then an output gate of the same size.
        fixed_values: a gate or norm acts on single channels between the attention's output and o_proj, so the basis of
            V cannot change; a function of the config where the config switches it.
        clip: config -> bound on every query, key and value after projection, or None. No change of basis commutes with
            such a clamp; methods that change the basis ignore it, since it affects only outliers.
        hosted: the class supports only one KV head per query head, so the result uses another class, its host
            (:mod:`rehead.convert.hosts`).
        guessed: not in the table but inferred from names and shapes; the caller must verify it numerically.
        notes: shown by ``rehead families``.
    """

    model_type: str
    layer: str = "model.layers.{i}."
    layer_aliases: tuple[str, ...] = ()
    attention: str = "self_attn."
    packing: Packing = "separate"
    transposed: bool = False
    names: Names = field(default_factory=Names)
    key_norm: KeyNorm | LayerNormed = "none"
    norm_offset: float = 0.0
    norm_after_rotation: bool = False
    pairing: Pairing = "half"
    rotary_dims: Callable[[Config, int], int] = rotary_all
    num_heads: Callable[[Config], int] = query_heads
    num_kv_heads: Callable[[Config], int] = kv_heads
    head_dim: Callable[[Config], int] = head_dim
    set_kv: Callable[[dict[str, Any], int], None] = set_kv_heads
    block: str | Callable[[Config], str] = "serial"
    post_norm: bool | Callable[[Config], bool] = False
    residual_scale: Callable[[Config, int], float] = no_scale
    refusal: Callable[[Config, int], str | None] = no_refusal
    has_attention: Callable[[Config, int], bool] = every_layer
    query_extras: tuple[str, ...] = ()
    gate_in_query: bool = False
    fixed_values: bool | Callable[[Config], bool] = False
    clip: Callable[[Config], float | None] = no_clip
    hosted: bool = False
    guessed: bool = False
    notes: str = ""

    def prefix(self, layer: int) -> str:
        """Full prefix of layer ``layer``'s attention tensors, e.g. ``"model.layers.3.self_attn."``."""
        return self.layer.format(i=layer) + self.attention

    def norm_of(self, config: Config, layer: int = 0) -> KeyNorm:
        """The key norm of one layer (some families switch it by a config key, Llama 4 by the layer too)."""
        return self.key_norm(config, layer) if callable(self.key_norm) else self.key_norm

    def block_of(self, config: Config) -> str:
        """Block shape of this config."""
        return self.block(config) if callable(self.block) else self.block

    def post_norm_of(self, config: Config) -> bool:
        """Whether this config norms the attention's output before the residual stream."""
        return self.post_norm(config) if callable(self.post_norm) else self.post_norm

    def fixed_values_of(self, config: Config) -> bool:
        """Whether this config pins the basis of V."""
        return self.fixed_values(config) if callable(self.fixed_values) else self.fixed_values

    def attention_layers(self, config: Config) -> list[int]:
        """Indices of the layers with attention."""
        return [i for i in range(config.num_hidden_layers) if self.has_attention(config, i)]


@dataclass(frozen=True)
class Refusal:
    """A model type that Rehead knows and refuses, with the reason and what to do instead."""

    model_type: str
    reason: str
