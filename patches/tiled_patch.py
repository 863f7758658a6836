"""The patch ``"tiled"``: exact tiled attention in every softmax attention layer of a live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache

from rehead.attention import adapters
from rehead.attention.cpu.lanes import DTYPES
from rehead.attention.discover import Found, find_attention
from rehead.attention.interface import NAME, RECORD
from rehead.attention.kernels.rules import MAX_HEAD_DIM
from rehead.errors import UnsupportedError, UsageError
from rehead.models import probing
from rehead.patches import measure
from rehead.patches import prove as proof
from rehead.patches.patch import LayerRecord, Patch, UndoLog, own_configs, register_patch


@register_patch
class TiledPatch(Patch):
    """Exact attention in tiles: no S x S memory, KV heads read without repeats; CPU tiles or Triton kernels.

    With ``window`` the patch also narrows every layer's mask and is then approximate: see :meth:`measure`.
    """

    name: ClassVar[str] = "tiled"
    summary: ClassVar[str] = "exact tiled attention (CPU tiles, Triton kernels); option window= makes it approximate"

    @dataclass
    class Options:
        """Options of the tiled patch.

        Attributes:
            window: let each row see only the last ``window`` keys its mask allows; None keeps the model's own mask.
            deterministic: bitwise repeatable gradients on the GPU, at some cost in speed.
        """

        window: int | None = None
        deterministic: bool = False

    options: Options  # type: ignore[assignment]

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        window = self.options.window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise UsageError(f"window must be a positive number of tokens or None, not {window!r}")

    @property
    def exact(self) -> bool:
        return self.options.window is None

    def _check(self) -> None:
        check_model(self.model)

    def _apply(self, undo: UndoLog) -> None:
        found = find_attention(self.model)
        _refuse_unknown(self.model, found)
        for name, module in found.interface + found.own:
            if RECORD in module.__dict__:
                raise UsageError(f"a patch is already applied to {name}; call its revert() first")
        self._untouched = found.towers
        was = {name: _implementation(module, self.model) for name, module in found.interface + found.own}
        copies = own_configs(self.model, undo)
        self._records = []
        for how, modules in (("interface", found.interface), ("adapter", found.own)):
            for name, module in modules:
                record = LayerRecord(
                    name,
                    type(module).__name__,
                    was[name],
                    NAME,
                    how,
                    window=self.options.window,
                    deterministic=self.options.deterministic,
                )
                undo.set_attribute(module, RECORD, record)
                self._records.append(record)
                if how == "adapter":
                    adapters.adapt(module, undo)
        self._set_implementation(found, copies)
        handle = self.model.register_forward_pre_hook(_refuse_arguments, with_kwargs=True)
        undo.add(handle.remove)

    def _set_implementation(self, found: Found, copies: dict[int, Any]) -> None:
        """Point the (copied) configs of the patched layers, and of the models that make their masks, at this patch."""
        targets: dict[int, Any] = {}
        for _, module in found.interface + found.own:
            config = module.__dict__.get("config")
            if config is not None:
                targets[id(config)] = config
        for config in copies.values():
            if not targets or config is getattr(self.model, "config", None):
                text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
                targets[id(text)] = text
        for module in self.model.modules():
            # Modules between the layers and the top that hold a config of their own build the mask from it.
            config = module.__dict__.get("config")
            if config is not None and any(type(config) is type(target) for target in list(targets.values())):
                targets[id(config)] = config
        for config in targets.values():
            # The public setter would hand the name down to sub-configs, and so to towers that are left alone.
            config._attn_implementation_internal = NAME

    def prove(self, **options: Any) -> Any:
        """Parity with the unpatched model, every layer called, no leak from later tokens; see :func:`proof.prove`.

        Raises:
            VerificationError: one of them fails.
            UsageError: the patch is not applied, or its options make it approximate.
        """
        if not self.exact:
            return super().prove(**options)
        return proof.prove(self, **options)

    def measure(self, **options: Any) -> Any:
        """How far the windowed model is from the original, and without the window; see :func:`measure.measure`.

        Raises:
            UsageError: the patch is not applied, is exact, or the tokens do not reach beyond the window.
        """
        window = self.options.window
        if window is None:
            return super().measure(**options)
        given = options.get("input_ids")
        tokens = options.get("length") or probing.default_length(self.model)
        if given is not None:
            tokens = probing.checked_tokens(given, self.model).shape[1]
        if tokens <= window:
            # Within the window nothing changes, and a KL of zero would pass for a finding.
            raise UsageError(
                f"rows of {tokens} tokens do not reach beyond a window of {window}; give measure() longer input_ids"
            )
        return measure.measure(self, **options)

    def switched_off(self) -> list[tuple[LayerRecord, str, Any]]:
        """The record fields that make this patch approximate, with their exact values, for :meth:`measure`."""
        return [(record, "window", None) for record in self._records]


def _implementation(module: nn.Module, model: nn.Module) -> str:
    config = module.__dict__.get("config") or getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "eager")


def _refuse_unknown(model: nn.Module, found: Found) -> None:
    missing = [(name, module) for name, module in found.own if adapters.adapter_for(module) is None]
    if missing:
        classes = sorted({type(module).__name__ for _, module in missing})
        raise UnsupportedError(
            f"{type(model).__name__} computes attention itself in {', '.join(classes)}, for which there is no adapter; "
            "see `rehead patches` for what can be patched"
        )
    if not found.interface and not found.own:
        raise UnsupportedError(f"{type(model).__name__} has no softmax attention layer to patch; see `rehead patches`")


def check_model(model: nn.Module) -> None:
    """Refuse what no tiled attention could run on; changes nothing.

    Raises:
        UsageError: attention weights are asked for in the config.
        UnsupportedError: meta device, tensor parallelism, dtype or head_dim.
    """
    floating: set[torch.dtype] = set()
    offloaded = _offloaded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in offloaded:
            raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights before patching")
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedError(
                f"{name} is split over devices; load the model without tp_plan, or patch it before fully_shard"
            )
        if parameter.is_floating_point():
            floating.add(parameter.dtype)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedError("the model is split over GPUs by tensor parallelism; load it without tp_plan")
    usable = [dtype for dtype in floating if dtype in DTYPES]
    if floating and not usable:
        raise UnsupportedError(
            f"the model's parameters are {', '.join(sorted(str(d) for d in floating))}; "
            "cast it to float32, bfloat16 or float16"
        )
    config = getattr(model, "config", None)
    if getattr(config, "output_attentions", False):
        raise UsageError(
            "config.output_attentions=True asks for attention weights, which tiled attention never forms; "
            "set it to False before patching"
        )
    for name, module in model.named_modules():
        dim = module.__dict__.get("head_dim")
        on_gpu = dim is not None and any(p.is_cuda for p in module.parameters(recurse=True))
        if on_gpu and isinstance(dim, int) and dim > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"{name} has head_dim {dim}, over the {MAX_HEAD_DIM} that the GPU kernels take; "
                "leave it on attn_implementation='sdpa'"
            )


def _offloaded(model: nn.Module) -> set[int]:
    """Ids of the parameters that accelerate keeps elsewhere and brings in as their module runs (``device_map``)."""
    return {
        id(parameter)
        for module in model.modules()
        if getattr(module.__dict__.get("_hf_hook"), "offload", False)
        for parameter in module.parameters(recurse=False)
    }


def _cache_layers(cache: Any) -> list[Any]:
    """Layers of a cache, those of both halves of an encoder-decoder cache included."""
    halves = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    return [layer for part in (cache, *halves) for layer in getattr(part, "layers", None) or ()]


def _is_quantised(layer: Any) -> bool:
    """Whether a cache layer stores keys and values in a quantised form; its base class has another name by version."""
    return any("Quantized" in cls.__name__ for cls in type(layer).__mro__)


def _refuse_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: what a call asks for that no tiled attention can give."""
    if kwargs.get("output_attentions"):
        raise UsageError(
            "output_attentions=True asks for attention weights, which tiled attention never forms; "
            "revert the patch for that run, or leave output_attentions out"
        )
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Cache) and any(_is_quantised(layer) for layer in _cache_layers(cache)):
        raise UnsupportedError(
            "the KV cache is quantised, which rehead_tiled does not read; use a DynamicCache or a StaticCache "
            "(leave cache_implementation='quantized' out)"
        )
