"""A checkpoint as a Rewrite leaves it: its tensors are renamed and computed as they are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.finite import check_finite, first_nonfinite
from rehead.checkpoints.source import Source, TensorInfo, torch_dtype
from rehead.errors import UnsupportedError
from rehead.lazy import late
from rehead.models.families.parallel import base_type
from rehead.models.rewrite import FLOATS, Derived, Rewrite

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

#: Computed layers to keep. A checkpoint may split a layer over two shards or order its tensors by name, and two cover
#: both; with any other order a layer is computed twice, but memory stays the same.
_KEPT_LAYERS = 2


class RewrittenSource(Source):
    """A source of the tensors that result from a Rewrite.

    Args:
        inner: the source that the Rewrite is applied to.
        rewrite: the change to apply.
        note: called with (layer, facts) once a layer has been computed.

    Attributes:
        computed: names of tensors whose bytes are not those of a file.
    """

    def __init__(
        self, inner: Source, rewrite: Rewrite, note: Callable[[int, dict[str, Any]], None] | None = None
    ) -> None:
        super().__init__()
        self.inner, self.rewrite, self._note = inner, rewrite, note
        self.id, self.revision, self.config = inner.id, inner.revision, rewrite.config
        self.metadata, self.shards = inner.metadata, inner.shards
        self.folder = getattr(inner, "folder", None)
        self.tensors: dict[str, TensorInfo] = {}
        self.computed: set[str] = set()
        before: set[str] = inner.computed if isinstance(inner, RewrittenSource) else set()
        for name, derived in rewrite.tensors.items():
            first = inner.tensors[derived.sources[0]]
            self.tensors[name] = replace(first, name=name, shape=derived.shape, dtype=derived.dtype or first.dtype)
            if derived.changed or self.tensors[name].dtype != first.dtype or derived.sources[0] in before:
                self.computed.add(name)
        same = base_type(str(rewrite.config.get("model_type"))) == base_type(str(inner.config.get("model_type")))
        if same or not rewrite.renames:  # tensors that a class ignores stay with that class
            for name, info in inner.ignored.items():
                cast = rewrite.dtype if info.dtype in FLOATS else None
                self.ignored[name] = replace(info, dtype=cast or info.dtype)
                if self.ignored[name].dtype != info.dtype or name in before:
                    self.computed.add(name)
        self._layers: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def read(self, name: str) -> Tensor:
        """One tensor; raises as :meth:`Source.read`, and UnsupportedError where a number is not finite."""
        info = self.info(name)
        derived = Derived((name,), info.shape) if name in self.ignored else self.rewrite.tensors[name]
        if derived.layer is not None:
            return self._layer(derived.layer)[name]
        inputs = [self._input(source) for source in derived.sources]
        made = inputs[0] if derived.compute is None else derived.compute(*inputs)
        return cast(name, made, torch_dtype(info.dtype)) if name in self.computed else made

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.computed:
            return self.read(name)[start:stop]
        return self.inner.read_rows(
            name if name in self.ignored else self.rewrite.tensors[name].sources[0], start, stop
        )

    def _input(self, name: str, layer: int | None = None) -> Tensor:
        tensor = self.inner.read(name)
        if not isinstance(self.inner, RewrittenSource):  # it has already checked what it read
            check_finite(name, tensor, layer)
        return tensor

    def _layer(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._layers:
            step = self.rewrite.step
            assert step is not None, f"the layers of {self.rewrite.name} can only be computed over calibration text"
            tensors, facts = step(layer, lambda name: self._input(name, layer))
            if self._note is not None:
                self._note(layer, facts)
            wanted = [name for name, at in self.rewrite.by_layer.items() if at == layer]
            self._layers[layer] = {
                name: cast(name, tensors[name], torch_dtype(self.tensors[name].dtype)) for name in wanted
            }
            while len(self._layers) > _KEPT_LAYERS:
                self._layers.popitem(last=False)
        return self._layers[layer]

    def weight_path(self, shard: str) -> Path:
        return self.inner.weight_path(shard)

    def list_files(self) -> list[str]:
        return self.inner.list_files()

    def small_path(self, name: str) -> Path:
        return self.inner.small_path(name)

    def identity(self) -> dict[str, str]:
        return self.inner.identity()

    def materialise(self, progress: Callable[[int, int], None] | None = None) -> None:
        self.inner.materialise(progress)

    def close(self) -> None:
        super().close()
        self.inner.close()


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A computed weight in the output's dtype.

    Raises:
        UnsupportedError: a number is not finite, or too large for the dtype.
    """
    result = tensor.to(dtype).contiguous()
    if first_nonfinite(result) is not None:
        if first_nonfinite(tensor) is not None:
            raise UnsupportedError(f"{name}: came out not finite; use --method mean, and report this model")
        limit = f"{str(dtype).removeprefix('torch.')}'s {torch.finfo(dtype).max:.3g}"
        raise UnsupportedError(
            f"{name}: holds {float(tensor.abs().max()):.3g}, beyond {limit}; choose --dtype bfloat16 or float32"
        )
    return result
