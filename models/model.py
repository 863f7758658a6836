"""Open a checkpoint for conversion: its source, config and family. Weights are read later, one layer at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rehead.checkpoints.finite import check_finite
from rehead.checkpoints.safetensors_io import DTYPE_BITS
from rehead.checkpoints.source import Source, torch_dtype
from rehead.errors import UnsupportedError
from rehead.lazy import late
from rehead.models.cache_layouts import layer_layout
from rehead.models.config import resolve_config
from rehead.models.families import resolve_family
from rehead.models.families.layouts import head_shapes, shared_norm_names, split, tensor_names
from rehead.models.families.resolve import refuse_type, with_checkpoint_prefix
from rehead.models.families.spec import Config, Family
from rehead.models.heads import Heads
from rehead.models.layout import LayerLayout
from rehead.models.meta import load_report, shapes_of
from rehead.models.remote import in_known_layout, open_known

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rehead.models.rewrite import Rewrite
else:
    torch = late("torch")

_FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass
class Model:
    """An open checkpoint.

    Attributes:
        source: reads its tensors.
        config: transformers' resolved config.
        family: the layout of its attention; its ``layer`` prefix is the checkpoint's own.
        layers: indices of the layers that have attention.
        module_layer: the layers' prefix in the class; the checkpoint's may lack the first part.
        rewrites: the changes since the checkpoint on disk, in order; see :func:`rehead.models.rewritten.rewritten`.
    """

    source: Source
    config: Config
    family: Family
    layers: list[int]
    module_layer: str = "model.layers.{i}."
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def num_heads(self) -> int:
        return self.family.num_heads(self.config)

    @property
    def num_kv_heads(self) -> int:
        return self.family.num_kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        return self.family.head_dim(self.config)

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of the tensors that hold a layer's heads."""
        return tensor_names(self.family, self.config, layer, self.source.tensors)

    def module_name(self, name: str) -> str:
        """The class's name for a checkpoint's tensor: a base model's checkpoint lacks the first part."""
        full, bare = self.module_layer, self.family.layer
        if full.endswith(bare):
            return full.removesuffix(bare) + name
        old, new = bare.split(".", 1)[0] + ".", full.split(".", 1)[0] + "."
        return new + name.removeprefix(old) if name.startswith(old) else name

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Read the tensors of a layer's attention, checked to be finite.

        Raises:
            UnsupportedError: one has a NaN or an infinity.
        """
        return {name: self.read(name, layer) for name in self.meta_layer(layer)}

    def read(self, name: str, layer: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on a device, where it is checked to be finite; raises as :meth:`read_layer`."""
        tensor = self.source.read(name).to(device)
        check_finite(name, tensor, layer)
        return tensor

    def heads(self, layer: int, tensors: Mapping[str, Tensor] | None = None) -> Heads:
        """One layer's heads, in the checkpoint's dtype.

        Raises:
            UnsupportedError: it has another number of query heads than the others.
        """
        if (getattr(self.config, "layer_heads", None) or {layer: None})[layer] is not None:
            raise UnsupportedError(
                f"{self.source.id}: layer {layer} has a number of query heads of its own, so nothing else can change "
                "it; name other layers"
            )
        return split(self.family, self.config, layer, tensors if tensors is not None else self.read_layer(layer))

    def meta_layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's attention, with the norm weights that its heads share, as shapes without data."""
        names = self.layer_tensors(layer) + shared_norm_names(self.family, self.config, layer, self.source.tensors)
        infos = [self.source.tensors[name] for name in names]
        return {info.name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for info in infos}

    def layer_on_meta(self, layer: int) -> Heads:
        """One layer's heads as shapes without data."""
        return self.heads(layer, self.meta_layer(layer))

    def fast_on(self, device: torch.device) -> bool:
        """Whether products of the weights need no more bits than TF32's: on a GPU, where all of them have 16 bits."""
        return device.type == "cuda" and {info.dtype for info in self.source.tensors.values()} <= {"BF16", "F16"}

    @property
    def layouts(self) -> list[LayerLayout]:
        """What each layer with attention caches, in the checkpoint's dtype."""
        first = next(self.source.tensors[name] for layer in self.layers for name in self.layer_tensors(layer))
        size = DTYPE_BITS[first.dtype] // 8
        return [layer_layout(self.family, self.config, layer, size) for layer in self.layers]

    def parameters(self) -> int:
        """Number of weights in the checkpoint."""
        return sum(math.prod(info.shape) for info in self.source.stored.values())


def open_model(model: str | os.PathLike[str] | Source, revision: str | None = None) -> Model:
    """Open a checkpoint for conversion: config and headers only.

    Args:
        model: a local folder, a Hub id, or an open source.
        revision: a Hub revision.

    Raises:
        UsageError: there is no such model.
        UnsupportedError: its architecture, format or layout cannot be converted; the message says what to do.
    """
    source = in_known_layout(model) if isinstance(model, Source) else open_known(model, revision)
    config = resolve_config(source.config, source.id)
    _refuse_quantised(source)
    refuse_type(config)
    source.ignore(load_report(config, shapes_of(source.tensors)).ignored & source.tensors.keys())
    family = resolve_family(config, source.tensors)
    opened = model_of(source, config, family)
    _check_shapes(opened)
    return opened


def model_of(source: Source, config: Config, family: Family) -> Model:
    """The model of a source whose family is known; raises UnsupportedError where its tensors are missing."""
    class_layer, family = family.layer, with_checkpoint_prefix(family, source.tensors)
    start = family.layer.split("{i}")[0]
    if not any(name.startswith(start) for name in source.tensors):
        raise UnsupportedError(
            f"{source.id}: has no tensor below {start!r}, where {family.model_type} keeps its layers; "
            "check that config.json belongs to these weights"
        )
    layers = family.attention_layers(config)
    if not layers:
        raise UnsupportedError(
            f"{source.id}: none of its layers has softmax attention, by its config, so there is none to convert; "
            "give a model with attention"
        )
    return Model(source, config, family, layers, class_layer)


def _refuse_quantised(source: Source) -> None:
    quantised = source.config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        raise UnsupportedError(
            f"{source.id}: is quantised ({method}), and heads cannot be pooled in that form; "
            "convert the unquantised original, then quantise the result"
        )


def _check_shapes(model: Model) -> None:
    """Refuse a checkpoint whose tensors do not have the heads that its config claims."""
    heads, kv, size, source = model.num_heads, model.num_kv_heads, model.head_dim, model.source
    if any(getattr(model.config, name, None) for name in ("layer_heads", "layer_kv_heads", "layer_latents")):
        raise UnsupportedError(
            f"{source.id}: its layers have forms of their own, which are not converted again; convert the model that "
            "it was made of"
        )
    for layer in model.layers:
        names = model.layer_tensors(layer)
        present = set(names)
        prefix, stems = model.family.prefix(layer), model.family.names
        wanted = [stems.query, stems.output]
        wanted += [stems.key, stems.value] if model.family.packing == "separate" else []
        for stem in wanted:
            if f"{prefix}{stem}.weight" not in present:
                raise UnsupportedError(
                    f"{source.id}: layer {layer} has no tensor {prefix}{stem}.weight; "
                    f"it is not laid out as {model.family.model_type} is"
                )
        claimed = head_shapes(model.family, model.config, layer, source.tensors, kv)
        extras = [source.tensors[prefix + name] for name in model.family.query_extras if prefix + name in present]
        whole = all(tuple(source.tensors[name].shape) == claimed.get(name) for name in names)
        if not whole or any(not info.shape or info.shape[0] % heads for info in extras):
            raise UnsupportedError(
                f"{source.id}: layer {layer}'s attention tensors do not hold the {heads} query and {kv} KV heads of "
                f"{size} that config.json claims; check that config.json belongs to these weights"
            )
        for name in names:
            if source.tensors[name].dtype not in _FLOATS:
                raise UnsupportedError(
                    f"{name}: is stored as {source.tensors[name].dtype}, which cannot be pooled; "
                    "convert the unquantised original"
                )
