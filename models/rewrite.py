"""A change of a checkpoint as data: the new config, and what each tensor of the result is made of.

Every step of a conversion is one :class:`Rewrite`: fewer KV heads, another class, another form of block, a wider model,
another dtype, a variant of attention. :mod:`rehead.models.rewritten` shows a checkpoint as a Rewrite leaves it, so that
the next one starts from there. :class:`Builder` fills one in where most tensors only change their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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


Step = Callable[[int, Read], tuple[dict[str, Tensor], dict[str, Any]]]
"""(layer, read) -> the layer's tensors by their new names, in any dtype, and facts about it for the manifest."""


@dataclass(frozen=True)
class Derived:
    """One tensor of the result.

    Attributes:
        sources: the source tensors it is made of; it is stored in the place of the first.
        shape: its shape.
        compute: makes it of them; None for the bytes of the only one, or for one that the layer step writes.
        layer: the layer whose step writes it, else None.
        dtype: safetensors dtype code in which it is stored; None for that of the first source.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[..., Tensor] | None = None
    layer: int | None = None
    dtype: str | None = None

    @property
    def changed(self) -> bool:
        """Whether its numbers or its shape are new, beyond the dtype in which they are stored."""
        return self.compute is not None or self.layer is not None


@dataclass(frozen=True)
class Changed:
    """What a closed form makes of a layer.

    Attributes:
        weights: the changed layer's weights, as heads (whose logits can then be refitted), or as float32 tensors by the
            checkpoint's names.
        facts: for the manifest.
        order: int64 [H], the old query head behind each new one; None where they have not changed places.
    """

    weights: Heads | dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    order: Tensor | None = None


@dataclass(frozen=True)
class Healing:
    """How layers in a form heal where it is not as attention usually does; None for the usual.

    Attributes:
        rate: the fit's step relative to each weight's root mean square.
        tokens: in one step of the fit, at most.
        drift: share of the prefix's drift that the fit takes back.
        reads: parameters of the attention module that read its input, [..., n]: they are fitted in coordinates in which
            inputs vary alike in every direction.
        ridge: pull of the refit of the matrices that write to the residual stream.
        on_original: the moments are of what the original's layer gets, not of what the changed prefix gives it.
        refit_first: the output is refitted before the fit too.
    """

    rate: float | None = None
    tokens: int | None = None
    drift: float | None = None
    reads: tuple[str, ...] = ()
    ridge: float | None = None
    on_original: bool = False
    refit_first: bool = True


@dataclass(frozen=True)
class LayerForm:
    """What becomes of one layer's heads, as a closed form that weights alone or calibration text can feed.

    Attributes:
        closed: (layer, the layer's heads, its moments or None) -> the changed layer.
        needs: names of the moments that it reads where the layer is calibrated.
        groups: groups of neighbouring query heads that it reads them for.
        calibrated: it cannot do without them.
        module: the attention module that has ``closed``'s tensors for parameters, as shapes; it takes the place of the
            class's own while layers heal. None where the class's own computes the form.
        writers: matrices, below the layer's prefix, that a refit fits at the end to what the original block writes.
        healing: how such layers heal.
    """

    closed: Callable[[int, Heads, Any], Changed]
    needs: tuple[str, ...] = ()
    groups: int = 1
    calibrated: bool = False
    module: Callable[[], Any] | None = None
    writers: tuple[str, ...] = ()
    healing: Healing = field(default_factory=Healing)


@dataclass(frozen=True)
class Rewrite:
    """One step of a conversion. Nothing is read until a tensor of the result is asked for.

    Attributes:
        name: of the step; its ``facts`` stand under it in plans and manifests.
        config: raw ``config.json`` of the result.
        target: the result's family, or that of the class it derives from.
        tensors: every tensor of the result by its new name, in the order of the source.
        step: computes what stands under a ``layer``; None where nothing does, or where only a calibrated run can.
        exact: the result computes the same function as what it is made of.
        rounds: weights are scaled, summed or stored in fewer bits, so an exact result is the source up to rounding.
        layers: layers that compute something else afterwards.
        facts: for the plan and the manifest; JSON types.
        form: what ``step`` does to a layer, where that is a closed form of its heads that healing can go on from.
        dtype: safetensors dtype code that every floating-point tensor of the result has; None where they keep theirs.
    """

    name: str
    config: dict[str, Any]
    target: Family
    tensors: dict[str, Derived]
    step: Step | None = None
    exact: bool = True
    rounds: bool = False
    layers: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    form: LayerForm | None = None
    dtype: str | None = None

    @property
    def by_layer(self) -> dict[str, int]:
        """The layer that computes each tensor that its step writes."""
        return {name: derived.layer for name, derived in self.tensors.items() if derived.layer is not None}

    @property
    def calibrated(self) -> bool:
        """Whether its layers can only be computed over calibration text."""
        return self.step is None and bool(self.by_layer)

    @property
    def renames(self) -> bool:
        """Whether a tensor of the result stands under another name than what it is made of."""
        return any(name != derived.sources[0] for name, derived in self.tensors.items())

    def stored_as(self, code: str, tensors: Mapping[str, TensorInfo]) -> Rewrite:
        """The same with its floating-point tensors in another dtype; what is computed is rounded once.

        Args:
            code: safetensors dtype code.
            tensors: headers of what it is made of.
        """
        cast, narrows = {}, False
        for name, derived in self.tensors.items():
            old = derived.dtype or tensors[derived.sources[0]].dtype
            floats = old in FLOATS and old != code
            cast[name] = replace(derived, dtype=code) if floats else derived
            narrows |= floats and code != "F32"
        return replace(self, tensors=cast, rounds=self.rounds or narrows, dtype=code)


FLOATS = ("F32", "BF16", "F16", "F64")
"""Dtypes that a conversion may cast."""


def unchanged(name: str, config: Mapping[str, Any], target: Family, tensors: Mapping[str, TensorInfo]) -> Rewrite:
    """A Rewrite under which every tensor is copied, to start from."""
    return Rewrite(name, dict(config), target, {key: Derived((key,), info.shape) for key, info in tensors.items()})


class Builder:
    """Fills in a Rewrite for one pair of classes.

    Args:
        source, target: families of the checkpoint and of its host.
        config: the checkpoint's resolved config; raw: the same as it stands in ``config.json``.
        tensors: headers of the checkpoint's tensors by name.
        name: of the Rewrite.
    """

    def __init__(
        self,
        source: Family,
        target: Family,
        config: Config,
        raw: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        name: str = "host",
    ) -> None:
        self.name = name
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

    def attention(self, change: Callable[[Heads, int, Read], Heads], reads: Callable[[int], Iterable[str]]) -> Step:
        """The attention of every layer, read by one family, changed as heads, and written by the other.

        Args:
            change: (heads, layer, read) -> heads of the same function for the host.
            reads: layer -> tensors that ``change`` reads besides.

        Returns:
            The Rewrite's layer step.
        """

        def step(layer: int, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
            names = tensor_names(self.source, self.config, layer, self.infos)
            heads = split(self.source, self.config, layer, {name: read(name) for name in names})
            return merge(self.target, layer, change(heads, layer, read), {}), {}

        for layer in self.source.attention_layers(self.config):
            names = tensor_names(self.source, self.config, layer, self.infos)
            if not names:
                raise self.refuse(f"layer {layer} has no attention tensors below {self.source.prefix(layer)}")
            for new, tensor in step(layer, self.on_meta)[0].items():
                sources = (*names, *reads(layer))
                if self._takes(new, sources):
                    self.tensors[new] = Derived(sources, tuple(tensor.shape), None, layer)
        return step

    def on_meta(self, name: str) -> Tensor:
        """A source tensor as a shape."""
        info = self.infos[name]
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")

    def finish(self, config: dict[str, Any], step: Step, buffers: str) -> Rewrite:
        """The Rewrite, once every tensor has its place.

        Args:
            buffers: regular expression of tensors, below the layer or the root, that nothing needs.

        Raises:
            UnsupportedError: a tensor has no place in the host.
        """
        ignored = re.compile(buffers)
        for left in self.infos.keys() - self._used:
            if not ignored.search(left):
                raise self.refuse(
                    f"{left} has no place in {self.target.model_type}, its host; give a plain {self.source.model_type}"
                )
        return Rewrite(self.name, config, self.target, self.tensors, step, rounds=self.rounds)

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
