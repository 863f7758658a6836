"""What a re-hosted checkpoint is made of, as data; and the builder that every host fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.safetensors_io import TensorInfo
from rehead.checkpoints.source import torch_dtype
from rehead.errors import UnsupportedError
from rehead.models.families.layouts import merge, split, tensor_names
from rehead.models.families.resolve import with_checkpoint_prefix
from rehead.models.families.spec import Config, Family
from rehead.models.heads import Heads

Read = Callable[[str], Tensor]
"""Gives a source tensor by name."""

# What travels from any config to any other as it is.
_CARRIED = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "task_specific_params",
    "id2label",
    "label2id",
)
# What every pair of causal configs holds under these names and means alike; read off the resolved config, since the
# classes' defaults differ.
_SHARED = ("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


@dataclass(frozen=True)
class Derived:
    """One tensor of the result.

    Attributes:
        sources: the source tensors it is made of; it is stored in the place of the first.
        shape: its shape; its dtype is that of the first source.
        compute: makes it of them; None for the bytes of the only one, or for one that the layer step writes.
        layer: the layer whose step writes it, else None.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[..., Tensor] | None = None
    layer: int | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of a source tensor."""
        return self.compute is None and self.layer is None


@dataclass(frozen=True)
class Recipe:
    """A model under another model type.

    Attributes:
        config: raw ``config.json`` of the result, with a KV head for each query head.
        target: the host's family.
        tensors: every tensor of the result, by its new name.
        dropped: source tensors that the result has no use for (buffers that older versions saved).
        step: (layer, read) -> the attention tensors of a layer, by their new names.
        rounds: weights are scaled or summed, so in a 16-bit dtype the result is the source up to rounding.
    """

    config: dict[str, Any]
    target: Family
    tensors: dict[str, Derived]
    dropped: tuple[str, ...]
    step: Callable[[int, Read], dict[str, Tensor]]
    rounds: bool


class Builder:
    """Fills in a recipe for one pair of classes.

    Args:
        source, target: families of the checkpoint and of its host.
        config: the checkpoint's resolved config; raw: the same as it stands in ``config.json``.
        tensors: headers of the checkpoint's tensors by name.
    """

    def __init__(
        self, source: Family, target: Family, config: Config, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self.source = with_checkpoint_prefix(source, tensors)
        self.target, self.config, self.raw, self.infos = target, config, raw, tensors
        self.tensors: dict[str, Derived] = {}
        self.rounds = False
        self._used: set[str] = set()

    @property
    def root(self) -> str:
        """What stands before a base model's tensors in this checkpoint, e.g. ``"gpt_neox."`` or nothing."""
        bare = self.source.layer.split("{i}")[0]
        whole = with_class_prefix(self.source).split("{i}")[0]
        first = whole.split(".", 1)[0] + "."
        return first if bare.startswith(first) else ""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self.infos

    def refuse(self, reason: str) -> UnsupportedError:
        """The error for a model that the host would not compute exactly."""
        return UnsupportedError(f"{self.source.model_type}: {reason}")

    def base_config(self, architecture: str) -> dict[str, Any]:
        """The keys that mean the same in every config."""
        result: dict[str, Any] = {key: self.raw[key] for key in _CARRIED if key in self.raw}
        result |= {key: getattr(self.config, key) for key in _SHARED if hasattr(self.config, key)}
        return result | {"model_type": self.target.model_type, "architectures": [architecture]}

    # ---- tensors

    def copy(self, new: str, old: str) -> None:
        """A tensor under another name."""
        if self._takes(new, (old,)):
            self.tensors[new] = Derived((old,), self.infos[old].shape)

    def make(self, new: str, olds: Iterable[str], compute: Callable[..., Tensor], rounds: bool = False) -> None:
        """A tensor made of others, each given in its own dtype."""
        olds = tuple(olds)
        if self._takes(new, olds):
            shape = tuple(compute(*(self.on_meta(old) for old in olds)).shape)
            self.tensors[new] = Derived(olds, shape, compute)
            self.rounds |= rounds

    def pair(self, new: str, old: str, transposed: bool = False, bias: bool | None = None) -> None:
        """A weight with its bias.

        Args:
            transposed: the source stores it [in, out].
            bias: None to carry over what there is; True where the host wants one, zero if the source has none.
        """
        if transposed:
            self.make(f"{new}.weight", (f"{old}.weight",), transpose)
        else:
            self.copy(f"{new}.weight", f"{old}.weight")
        if self.has(f"{old}.bias"):
            self.copy(f"{new}.bias", f"{old}.bias")
        elif bias:
            rows = -1 if transposed else 0
            self.make(f"{new}.bias", (f"{old}.weight",), lambda weight: weight.new_zeros(weight.shape[rows]))

    def attention(self, change: Callable[[Heads, int, Read], Heads], reads: Callable[[int], Iterable[str]]) -> Any:
        """The attention of every layer, read by one family, changed as heads, and written by the other.

        Args:
            change: (heads, layer, read) -> heads of the same function for the host.
            reads: layer -> tensors that ``change`` reads besides.

        Returns:
            The recipe's layer step.
        """

        def step(layer: int, read: Read) -> dict[str, Tensor]:
            names = tensor_names(self.source, self.config, layer, self.infos)
            heads = split(self.source, self.config, layer, {name: read(name) for name in names})
            return merge(self.target, layer, change(heads, layer, read), {})

        for layer in self.source.attention_layers(self.config):
            names = tensor_names(self.source, self.config, layer, self.infos)
            if not names:
                raise self.refuse(f"layer {layer} has no attention tensors below {self.source.prefix(layer)}")
            for new, tensor in step(layer, self.on_meta).items():
                sources = (*names, *reads(layer))
                if self._takes(new, sources):
                    self.tensors[new] = Derived(sources, tuple(tensor.shape), None, layer)
        return step

    def on_meta(self, name: str) -> Tensor:
        """A source tensor as a shape."""
        info = self.infos[name]
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")

    def finish(self, config: dict[str, Any], step: Callable[..., Any], buffers: str) -> Recipe:
        """The recipe, once every tensor has its place.

        Args:
            buffers: regular expression of tensors, below the layer or the root, that nothing needs.

        Raises:
            UnsupportedError: a tensor has no place in the host.
        """
        ignored = re.compile(buffers)
        dropped = []
        for name in self.infos.keys() - self._used:
            if not ignored.search(name):
                raise self.refuse(
                    f"{name} has no place in {self.target.model_type}, its host; give a plain {self.source.model_type}"
                )
            dropped.append(name)
        return Recipe(config, self.target, self.tensors, tuple(sorted(dropped)), step, self.rounds)

    def _takes(self, new: str, olds: tuple[str, ...]) -> bool:
        missing = [old for old in olds if old not in self.infos]
        if missing:
            raise self.refuse(f"there is no tensor {missing[0]}, of which {new} would be made; fetch it again")
        self._used.update(olds)
        return True


def with_class_prefix(family: Family) -> str:
    """The layer prefix in the class, whatever the checkpoint's is."""
    from rehead.models.families.table import FAMILIES

    return FAMILIES[family.model_type].layer


def transpose(weight: Tensor) -> Tensor:
    """[in, out] as [out, in]."""
    return weight.T.contiguous()
