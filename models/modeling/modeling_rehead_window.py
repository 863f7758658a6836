"""Decoders whose layers see a window of the last keys and the first tokens of the text, their sinks.

The file travels beside a checkpoint, with ``modeling_rehead_core.py`` and those for caches and latents. Every class is
transformers' own with the same parameters under the same names; ``config.layer_windows`` says what each layer sees,
``config.sink_tokens`` how many first tokens stay visible, and with ``config.sink_logits`` each head has one more logit
in the denominator of its softmax, ``self_attn.sinks`` (Xiao et al. 2023, arXiv 2309.17453). Caches keep what is seen.
With ``config.layer_kv_heads`` a layer has a number of KV heads of its own, each read by as many query heads as
``self_attn.kv_sizes`` says; with ``config.layer_heads`` a number of query heads, as many for each KV head; with
``config.layer_latents`` a layer attends over latents. So layers may all differ.

``WindowLlamaConfig``, ``WindowLlamaModel``, ``WindowLlamaForCausalLM`` and so on for every name in ``FAMILIES`` are
made from the installed transformers on first use.
"""

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from .modeling_rehead_cache import NAMES, cache_argument, passed_cache
from .modeling_rehead_core import DerivedClasses, named
from .modeling_rehead_latent import LatentAttention
from .modeling_rehead_ring import WindowLayer, use_windows

FAMILIES = {
    "arcee": "Arcee",
    "ernie4_5": "Ernie4_5",
    "gemma": "Gemma",
    "glm": "Glm",
    "granite": "Granite",
    "helium": "Helium",
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2",
}
"""Model type -> prefix of its classes. All call transformers' attention interface from ``self_attn``."""

TYPE_PREFIX = "rehead_window_"
NAME = "rehead_window"
"""The attention implementation that computes these layers."""
NO_SINK = -1e4
"""A logit that takes no share."""


def window_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' interface: ``[B, Sq, H, D]``.

    Args:
        module: the attention module, with ``rehead_window`` (window or None, sinks) and perhaps ``sinks`` [H].
        query: ``[B, H, Sq, D]``; key, value: ``[B, K, Skv, D]``, of a window layer's cache those that it kept.
        attention_mask: bool ``[B, 1, Sq, S]`` over all positions of the text, causality and padding included.
        scaling, dropout: as usual.
    """
    window, sinks = module.__dict__["rehead_window"]
    ring = module.__dict__.get("rehead_ring")
    mask = attention_mask
    if mask is None:
        rows, keys = query.shape[2], key.shape[2]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)[None, None]
    if window is not None:
        count = key.shape[2]
        kept = torch.arange(count, device=key.device)[None] if ring is None else ring.positions(count, key.device)
        # A row's own position is the last that it sees; padding comes before the first.
        last = mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)[:, 0]
        first = mask.int().argmax(-1)[:, 0]
        mask = mask.expand(max(len(mask), len(kept)), -1, -1, -1).gather(
            3, kept[:, None, None].expand(max(len(mask), len(kept)), 1, mask.shape[2], -1).clamp(max=mask.shape[-1] - 1)
        )
        near = last[:, :, None] - kept[:, None] < window
        mask = mask & (near | (kept[:, None] < first[:, :, None] + sinks))[:, None]
    sizes = module._buffers.get("kv_sizes")
    groups = query.shape[1] // key.shape[1] if sizes is None else sizes.round().long()
    logits = module._parameters.get("sinks")
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    if logits is not None:  # one more key of zeros, whose score is the logit
        column = logits.to(query.dtype)[None, :, None, None].expand(len(bias), -1, query.shape[2], 1)
        bias = torch.cat([bias.expand(-1, query.shape[1], -1, -1), column], -1)
        key, value = (F.pad(states, (0, 0, 0, 1)) for states in (key, value))
    else:
        bias = bias.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # rows of padding, which nobody reads
    key, value = (states.repeat_interleave(groups, 1, output_size=query.shape[1]) for states in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def window_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask of :func:`window_attention`: causality and padding over the whole text, never left out."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        **({} if mask_function is None else {"mask_function": mask_function}), attention_mask=attention_mask,
        allow_is_causal_skip=False, device=device,
    )  # fmt: skip
    assert mask is not None
    return mask


def check_windows(config: Any) -> None:
    """Complete a config that was read.

    Raises:
        ValueError: windows that are not one for each layer, or not positive.
    """
    count = config.num_hidden_layers
    if config.layer_windows is None:
        config.layer_windows = [None] * count
    config.sink_tokens, config.sink_logits = config.sink_tokens or 0, bool(config.sink_logits)
    for name in ("layer_windows", "layer_heads", "layer_kv_heads", "layer_latents"):
        entries = getattr(config, name)
        if entries is not None and len(entries) != count:
            raise ValueError(f"config.{name} has {len(entries)} entries, but there are {count} layers")
    wrong = [window for window in config.layer_windows if window is not None and window < 1]
    if wrong or config.sink_tokens < 0:
        raise ValueError(f"a window of {wrong[0] if wrong else config.sink_tokens} tokens sees nothing; give 1 or more")
    for sizes in config.layer_latents or ():
        if sizes is not None and not (isinstance(sizes, dict) and sizes.get("rank") and sizes.get("pairs")):
            raise ValueError("an entry of config.layer_latents lacks its rank or its pairs")
    config.sliding_window = None
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * count


class WindowModel:
    """Mixed into a model: its attention layers see the windows that the config names."""

    def __init__(self, config: Any) -> None:
        if config._attn_implementation in (None, "eager", "sdpa"):
            config._attn_implementation = NAME
        super().__init__(config)  # type: ignore[call-arg]
        none = [None] * config.num_hidden_layers
        lists = (config.layer_windows, config.layer_heads, config.layer_kv_heads, config.layer_latents)
        forms = zip(*(entries or none for entries in lists))
        for index, (layer, (window, queries, count, sizes)) in enumerate(zip(self.base_model.layers, forms)):  # type: ignore[attr-defined]
            if sizes is not None and not isinstance(layer.self_attn, LatentAttention):
                layer.self_attn = LatentAttention(layer.self_attn, index, sizes)
            attention = layer.self_attn
            attention.rehead_window = (window, config.sink_tokens)
            if queries is not None:
                _fewer_queries(attention, queries)
            if count is not None and "kv_sizes" not in attention._buffers:
                _share_heads(attention, count)
            if config.sink_logits and sizes is None and "sinks" not in attention._parameters:
                heads = queries or config.num_attention_heads
                attention.sinks = nn.Parameter(torch.full((heads,), NO_SINK))
        self.base_model.register_forward_pre_hook(_with_windows, with_kwargs=True)  # type: ignore[attr-defined]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """As transformers', with window layers from the start, so that drafted tokens can be taken back."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if isinstance(cache := passed_cache(model_kwargs), transformers.Cache):
            use_windows(cache, _windows(self.config))  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if "sinks" in module._parameters:
            nn.init.constant_(module.sinks, NO_SINK)  # type: ignore[arg-type]
        if isinstance(module, LatentAttention):
            for name, weight in module._parameters.items():
                nn.init.normal_(weight, 0.0, 0.0 if name.endswith("_bias") else self.config.initializer_range)  # type: ignore[arg-type,attr-defined]


def _windows(config: Any) -> list[tuple[int, int, int]]:
    """(layer, window, sinks) of every layer with a window."""
    return [(i, window, config.sink_tokens) for i, window in enumerate(config.layer_windows) if window is not None]


def _resized(old: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, old.bias is not None, old.weight.device).to(old.weight.dtype)


def _fewer_queries(attention: Any, count: int) -> None:
    """Give an attention module ``count`` query heads, as many for each KV head."""
    width, kv = count * attention.head_dim, attention.k_proj.out_features // attention.head_dim
    attention.q_proj = _resized(attention.q_proj, attention.q_proj.in_features, width)
    attention.o_proj = _resized(attention.o_proj, width, attention.o_proj.out_features)
    attention.num_key_value_groups = count // kv


def _share_heads(attention: Any, count: int) -> None:
    """Give an attention module ``count`` KV heads, read by as many query heads each as its ``kv_sizes`` say."""
    for name in ("k_proj", "v_proj"):
        old = getattr(attention, name)
        setattr(attention, name, _resized(old, old.in_features, count * attention.head_dim))
    sizes = torch.ones(count, device=attention.k_proj.weight.device)
    attention.register_buffer("kv_sizes", sizes)  # a tensor: which heads share is only known with the weights


def _with_windows(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each forward pass: caches that keep windows, and the attention layers told which cache is theirs."""
    config, cache = model.config, passed_cache(kwargs)
    if config.layer_kv_heads and config._attn_implementation not in (NAME, "rehead_probe"):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} knows no groups of unequal size; load without it"
        )
    if config._attn_implementation not in (NAME, "rehead_tiled", "rehead_probe"):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} knows no sink tokens; load the model without it"
        )
    wanted = kwargs.get("use_cache")
    if cache is None and (config.use_cache if wanted is None else wanted) and not model.training:
        cache = transformers.DynamicCache(config=config)
        kwargs = {name: value for name, value in kwargs.items() if name not in NAMES} | cache_argument(cache)
    if cache is not None:
        use_windows(cache, _windows(config), kwargs.get("attention_mask"))
    for index, layer in enumerate(model.layers):
        mine = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        layer.self_attn.__dict__["rehead_ring"] = mine if isinstance(mine, WindowLayer) else None
    return args, kwargs


def _derived(model_type: str, prefix: str) -> DerivedClasses:
    def models(suffix: str) -> tuple[str, Any]:
        return f"Window{prefix}{suffix}", lambda: (WindowModel, getattr(transformers, prefix + suffix))

    def also() -> None:
        transformers.AttentionInterface.register(NAME, window_attention)
        transformers.AttentionMaskInterface.register(NAME, window_mask)

    return DerivedClasses(
        module=__name__,
        model_type=TYPE_PREFIX + model_type,
        config=f"Window{prefix}Config",
        base=lambda: getattr(transformers, f"{prefix}Config"),
        fields={
            "layer_windows": list | None,
            "sink_tokens": int | None,
            "sink_logits": bool | None,
            "layer_heads": list | None,
            "layer_kv_heads": list | None,
            "layer_latents": list | None,
        },
        check=check_windows,
        models={"AutoModel": models("Model"), "AutoModelForCausalLM": models("ForCausalLM")},
        also=also,
    )


DERIVED = [_derived(model_type, prefix) for model_type, prefix in FAMILIES.items()]


def __getattr__(name: str) -> Any:
    """A config or model class, made when it is first used."""
    return named(DERIVED, name)


def register() -> None:
    """Register every config with ``AutoConfig``; models are registered when one of their configs is created."""
    for model_type, derived in zip(FAMILIES, DERIVED):
        if model_type in transformers.CONFIG_MAPPING:
            derived.register()
