"""Config readers shared by several table entries: which layers have attention or RoPE, and what scales and gates."""

from __future__ import annotations

from collections.abc import Callable

from rehead.models.families.spec import Config, KeyNorm, head_dim, rope_parameters


def layer_kind(config: Config, layer: int) -> str:
    """The layer's entry in ``layer_types`` (or its older name), ``"full_attention"`` where the config has none."""
    for key in ("layer_types", "layers_block_type"):
        kinds = getattr(config, key, None)
        if kinds:
            return kinds[layer]
    return "full_attention"


def attends(config: Config, layer: int) -> bool:
    """Whether a hybrid's layer is softmax attention, not recurrent, convolutional or linear attention."""
    kind = layer_kind(config, layer)
    return "attention" in kind and not kind.startswith("linear")


def windowed(config: Config, layer: int) -> bool:
    """Whether a layer attends within a sliding window."""
    return layer_kind(config, layer) == "sliding_attention"


def rotary_in_windows(config: Config, layer: int) -> int:
    """Only sliding-window layers rotate (Cohere 2, AFMoE, Flint)."""
    return head_dim(config) if windowed(config, layer) else 0


def rotary_in_windows_if_any(config: Config, layer: int) -> int:
    """Only sliding-window layers rotate, or all where the model has no window (EXAONE 4)."""
    return head_dim(config) if config.sliding_window is None or windowed(config, layer) else 0


def rotary_by_list(config: Config, layer: int) -> int:
    """``no_rope_layers`` holds a 1 for every layer that does rotate (SmolLM 3, Llama 4)."""
    return head_dim(config) if config.no_rope_layers[layer] else 0


def rotary_by_theta(config: Config, layer: int) -> int:
    """A theta of 0 in ``layer_rope_theta`` switches RoPE off in a layer (Granite SWA)."""
    return head_dim(config) if config.layer_rope_theta[layer] else 0


def rotary_if_parameters(config: Config, layer: int) -> int:
    """The whole head, wherever the config holds parameters for RoPE (OLMo Hybrid, Beam's layers without a window)."""
    return head_dim(config) if rope_parameters(config, layer).get("rope_theta") is not None else 0


def rotary_by_name(config: Config, layer: int) -> int:
    """``position_embedding_type`` says whether there is RoPE (Granite hybrids)."""
    return head_dim(config) if config.position_embedding_type == "rope" else 0


def rotary_by_dims(config: Config, layer: int) -> int:
    """``rotary_dim`` of the head's dimensions rotate (GPT-J, CodeGen)."""
    return int(config.rotary_dim or 0)


def norm_if(key: str, norm: KeyNorm) -> Callable[[Config, int], KeyNorm]:
    """A reader: ``norm`` where the config's ``key`` is true."""
    return lambda config, layer: norm if getattr(config, key, False) else "none"


def parallel_if(key: str) -> Callable[[Config], str]:
    """A reader: a parallel block where the config's ``key`` is true."""
    return lambda config: "parallel" if getattr(config, key, False) else "serial"


def scale_of(key: str) -> Callable[[Config, int], float]:
    """A reader: the residual factor under ``key``."""
    return lambda config, layer: float(getattr(config, key))


def clip_of(config: Config) -> float | None:
    """``clip_qkv`` of the config or of its attention part."""
    bound = getattr(getattr(config, "attn_config", config), "clip_qkv", None)
    return None if bound is None else float(bound)
