"""A source seen under another model type: the same weights, renamed, moved and folded as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rehead.checkpoints.finite import first_nonfinite
from rehead.checkpoints.source import Source, TensorInfo, torch_dtype
from rehead.errors import UnsupportedError
from rehead.models.rewrite import Recipe


class HostedSource(Source):
    """A checkpoint as the class that stands in for its own sees it, with a KV head for each query head.

    Args:
        inner: the checkpoint itself.
        recipe: how it is re-hosted.

    Attributes:
        computed: tensors whose bytes are not the file's.
    """

    def __init__(self, inner: Source, recipe: Recipe) -> None:
        super().__init__()
        self.inner, self.recipe = inner, recipe
        self.id, self.revision, self.config = inner.id, inner.revision, recipe.config
        self.metadata, self.shards = inner.metadata, inner.shards
        self.folder = getattr(inner, "folder", None)
        self.tensors: dict[str, TensorInfo] = {}
        for name, derived in recipe.tensors.items():
            self.tensors[name] = replace(inner.tensors[derived.sources[0]], name=name, shape=derived.shape)
        self.computed = {name for name, derived in recipe.tensors.items() if not derived.copied}
        if isinstance(inner, HostedSource):
            self.computed |= {name for name, derived in recipe.tensors.items() if derived.sources[0] in inner.computed}
        self._layer: tuple[int, dict[str, torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        info = self.info(name)
        if name in self.ignored:
            return self.inner.read(name)
        derived = self.recipe.tensors[name]
        if derived.layer is not None:
            if self._layer is None or self._layer[0] != derived.layer:
                self._layer = (derived.layer, self.recipe.step(derived.layer, self.inner.read))
            made = self._layer[1][name]
        elif derived.compute is None:
            return self.inner.read(derived.sources[0])
        else:
            made = derived.compute(*(self.inner.read(source) for source in derived.sources))
        return made.to(torch_dtype(info.dtype)).contiguous()

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
    """A computed weight in the dtype that is written.

    Raises:
        UnsupportedError: a number is beyond the dtype.
    """
    result = tensor.to(dtype)
    if first_nonfinite(result) is not None:
        if first_nonfinite(tensor) is not None:
            raise UnsupportedError(f"{name}: came out not finite; use --method mean, and report this model")
        limit = f"{str(dtype).removeprefix('torch.')}'s {torch.finfo(dtype).max:.3g}"
        raise UnsupportedError(
            f"{name}: holds {float(tensor.abs().max()):.3g}, beyond {limit}; choose --dtype bfloat16 or float32"
        )
    return result
