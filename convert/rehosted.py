"""A source seen under another model type: the same weights, renamed and transposed as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rehead.convert.families.layouts import merge, split
from rehead.convert.rehost import Rehost
from rehead.convert.source import Source, TensorInfo

if TYPE_CHECKING:
    import torch

    from rehead.convert.families.spec import Config


class RehostedSource(Source):
    """A checkpoint as the class that stands in for its own sees it, with a KV head for each query head.

    Everything downstream (plan, calibration, pooling) works on it as on any other source.

    Args:
        inner: the checkpoint itself.
        recipe: how it is re-hosted.
        config: the checkpoint's own resolved config.
    """

    def __init__(self, inner: Source, recipe: Rehost, config: Config) -> None:
        super().__init__()
        self.inner, self.recipe, self._config = inner, recipe, config
        self.id, self.revision, self.config = inner.id, inner.revision, recipe.config
        self.metadata, self.shards = inner.metadata, inner.shards
        self.folder = getattr(inner, "folder", None)
        self.tensors: dict[str, TensorInfo] = {}
        for name, placement in recipe.tensors.items():
            info = inner.tensors[placement.source]
            shape = info.shape if placement.how == "copy" or len(info.shape) < 2 else info.shape[::-1]
            self.tensors[name] = replace(info, name=name, shape=tuple(shape))
        #: Tensors whose bytes are not the file's.
        self.computed = {name for name, placement in recipe.tensors.items() if placement.how != "copy"}
        self._layer: tuple[int, dict[str, torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        placement = self.recipe.tensors[self.info(name).name]
        if placement.how == "copy":
            return self.inner.read(placement.source)
        if placement.how == "transpose":
            return self.inner.read(placement.source).T.contiguous()
        assert placement.layer is not None
        if self._layer is None or self._layer[0] != placement.layer:
            self._layer = (placement.layer, self._read_layer(placement.layer))
        return self._layer[1][name]

    def _read_layer(self, layer: int) -> dict[str, torch.Tensor]:
        sources = [p.source for p in self.recipe.tensors.values() if p.layer == layer]
        heads = split(self.recipe.source, self._config, layer, {name: self.inner.read(name) for name in sources})
        return merge(self.recipe.target, layer, heads, self.tensors)

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
