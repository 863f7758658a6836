"""A change of a checkpoint as data: the new config, and which source tensors each tensor of the result comes from.

Every step of a conversion is one :class:`Rewrite`: fewer KV heads, another class, another form of block, a wider model,
another dtype, a variant of attention. :mod:`rehead.models.rewritten` applies one to a checkpoint, so that the next can
start from the result. :class:`Builder` makes a Rewrite where most tensors only change their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.safetensors_io import TensorInfo
from rehead.checkpoints.source import torch_dtype
from rehead.errors import UnsupportedError
from rehead.lazy import late
from rehead.models.families.layouts import merge, split, tensor_names
from rehead.models.families.resolve import with_checkpoint_prefix
from rehead.models.families.spec import Config, Family
from rehead.models.heads import Heads

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

Read = Callable[[str], "Tensor"]
"""Returns a source tensor by name."""

# Keys that any config passes on to any other unchanged.
_CARRIED = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "task_specific_params",
    "id2label",
    "label2id",
)
# Keys with the same meaning in all causal configs; read from the resolved config, since the classes' defaults differ.
_SHARED = ("vocab_size", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


Step = Callable[[int, Read], "tuple[dict[str, Tensor], dict[str, Any]]"]
"""(layer, read) -> the layer's tensors by their new names, in any dtype, and facts about it for the manifest."""


@dataclass(frozen=True)
class Derived:
    """One tensor of the result.

    Attributes:
        sources: the source tensors that it is computed from; it takes the place of the first.
        shape: number of elements in each dimension.
        compute: source tensors -> this tensor; None for a copy, or for a tensor that the layer step computes.
        layer: the layer whose step computes it, else None.
        dtype: safetensors dtype code in which it is stored; None for that of the first source.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[..., Tensor] | None = None
    layer: int | None = None
    dtype: str | None = None

    @property
    def changed(self) -> bool:
        """Whether it is computed, rather than a copy (perhaps in another dtype)."""
        return self.compute is not None or self.layer is not None


@dataclass(frozen=True)
class Changed:
    """A layer as changed by a closed form.

    Attributes:
        weights: the changed layer's weights, as heads (whose logits can then be refitted), or as float32 tensors by the
            checkpoint's names.
        facts: entries for the manifest.
        order: int64 [H], the old index of each query head; None where the order is unchanged.
    """

    weights: Heads | dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    order: Tensor | None = None


class NeedsHost(UnsupportedError):
    """A step that the model's class cannot hold and another can: the conversion is planned again under that one.

    Args:
        message: the refusal, where it cannot stand in for the model's own either.
        host: the class, as ``--host`` names it.
    """

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message)
        self.host = host


@dataclass(frozen=True)
class RecoverySettings:
    """How recovery differs for layers in a form; None stands for the usual setting.

    Attributes:
        rate: the fit's step relative to each weight's root mean square.
        tokens: largest number of tokens per step of the fit.
        drift: share of the error of the changed layers before that the fit corrects.
        reads: parameters of the attention module that read its input, [..., n]; they are fitted in coordinates in which
            the inputs have equal variance in every direction.
        ridge: pull of the refit of the matrices that write to the residual stream.
        on_original: moments are gathered on the original's inputs, not on those from the changed layers before.
        refit_first: refit the output before the fit too.
        logits: refit queries and keys to the original's logits, where they are linear in the weights.
        half: the fit computes in bfloat16 on a GPU.
    """

    rate: float | None = None
    tokens: int | None = None
    drift: float | None = None
    reads: tuple[str, ...] = ()
    ridge: float | None = None
    on_original: bool = False
    refit_first: bool = True
    logits: bool = True
    half: bool = False


@dataclass(frozen=True)
class LayerForm:
    """How one layer's heads change: a closed form of the weights and, if available, of calibration moments.

    Attributes:
        closed: (layer, the layer's heads, its moments or None) -> the changed layer.
        needs: names of the moments that it uses when the layer is calibrated.
        groups: number of groups of neighbouring query heads to gather moments for.
        calibrated: it requires moments.
        module: an attention module, as shapes, whose parameters are ``closed``'s tensors; it replaces the class's own
            during recovery. None where the class's own computes the form.
        writers: names of matrices below the layer that are refitted last, to the output of the original block.
        settings: settings of the recovery of such layers.
        trains: parameters of the attention module that the fit moves besides its projections.
        own_calls: the changed layer is called in another way than the original's (with another mask).
        hides: it hides what is far back, so that calibration text must hold something that looks there.
    """

    closed: Callable[[int, Heads, Any], Changed]
    needs: tuple[str, ...] = ()
    groups: int = 1
    calibrated: bool = False
    module: Callable[[], Any] | None = None
    writers: tuple[str, ...] = ()
    settings: RecoverySettings = field(default_factory=RecoverySettings)
    trains: tuple[str, ...] = ()
    own_calls: bool = False
    hides: bool = False


@dataclass(frozen=True)
class Rewrite:
    """One step of a conversion. No weight is read until a tensor of the result is needed.

    Attributes:
        name: the step's name, and the key of its ``facts`` in plans and manifests.
        config: raw ``config.json`` of the result.
        target: the result's family, or that of the class it derives from.
        tensors: every tensor of the result by its new name, in the order of the source.
        step: computes the tensors with a ``layer``; None if there are none, or if only a calibrated run can.
        exact: the result computes the same function as the source.
        rounds: weights are scaled, summed or stored in fewer bits, so an exact result equals the source up to rounding.
        layers: layers that compute another function afterwards.
        facts: entries for the plan and the manifest; JSON types.
        form: the closed form behind ``step``, if recovery on calibration text can use it.
        dtype: safetensors dtype code of every floating-point tensor of the result; None where they keep their own.
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
        """The layer of each tensor that ``step`` computes, by the tensor's name."""
        return {name: derived.layer for name, derived in self.tensors.items() if derived.layer is not None}

    @property
    def calibrated(self) -> bool:
        """Whether its layers need calibration text."""
        return self.step is None and bool(self.by_layer)

    @property
    def renames(self) -> bool:
        """Whether a tensor of the result has another name than its first source."""
        return any(name != derived.sources[0] for name, derived in self.tensors.items())

    def stored_as(self, code: str, tensors: Mapping[str, TensorInfo]) -> Rewrite:
        """A copy whose floating-point tensors are stored in another dtype; computed tensors are rounded once.

        Args:
            code: safetensors dtype code.
            tensors: headers of the source's tensors by name.
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


def layer_in(name: str) -> int | None:
    """The layer that a tensor belongs to by its name, whatever the class; None for one outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def unchanged(name: str, config: Mapping[str, Any], target: Family, tensors: Mapping[str, TensorInfo]) -> Rewrite:
    """A Rewrite that copies every tensor, to start from."""
    return Rewrite(name, dict(config), target, {key: Derived((key,), info.shape) for key, info in tensors.items()})


class Builder:
    """Builds a Rewrite from one class to another, tensor by tensor.

    Args:
        source, target: families of the checkpoint and of the host, the class that it is converted to.
        config: the checkpoint's resolved config.
        raw: its ``config.json``.
        tensors: headers of the checkpoint's tensors by name.
        name: the Rewrite's name.
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
        """The prefix of a base model's tensors in this checkpoint, e.g. ``"gpt_neox."`` or nothing."""
        bare = self.source.layer.split("{i}")[0]
        whole = with_class_prefix(self.source).split("{i}")[0]
        first = whole.split(".", 1)[0] + "."
        return first if bare.startswith(first) else ""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self.infos

    def refuse(self, reason: str) -> UnsupportedError:
        """The error to raise for a model that the host would not compute exactly."""
        return UnsupportedError(f"{self.source.model_type}: {reason}")

    def base_config(self, architecture: str) -> dict[str, Any]:
        """The host's config with the keys that mean the same in every config."""
        result: dict[str, Any] = {key: self.raw[key] for key in _CARRIED if key in self.raw}
        result |= {key: getattr(self.config, key) for key in _SHARED if hasattr(self.config, key)}
        return result | {"model_type": self.target.model_type, "architectures": [architecture]}

    # ---- tensors

    def copy(self, new: str, old: str) -> None:
        """Add the tensor ``old`` under the name ``new``."""
        if self._takes(new, (old,)):
            self.tensors[new] = Derived((old,), self.infos[old].shape)

    def make(self, new: str, olds: Iterable[str], compute: Callable[..., Tensor], rounds: bool = False) -> None:
        """Add the tensor ``new``, computed from the tensors ``olds`` in their own dtypes."""
        olds = tuple(olds)
        if self._takes(new, olds):
            shape = tuple(compute(*(self.on_meta(old) for old in olds)).shape)
            self.tensors[new] = Derived(olds, shape, compute)
            self.rounds |= rounds

    def pair(self, new: str, old: str, transposed: bool = False, bias: bool | None = None) -> None:
        """Add a weight and its bias under another name.

        Args:
            new, old: names without ``.weight`` and ``.bias``.
            transposed: the source stores the weight as [in, out].
            bias: True if the host needs a bias (zeros if the source has none); None to copy one if there is one.
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
        """Add the attention of every layer: read as heads by the source's family, changed, written by the host's.

        Args:
            change: (heads, layer, read) -> heads of the same function for the host.
            reads: layer -> further tensors that ``change`` reads.

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
        """A source tensor without its data."""
        info = self.infos[name]
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")

    def finish(self, config: dict[str, Any], step: Step | None, buffers: str) -> Rewrite:
        """The Rewrite, once every source tensor is used.

        Args:
            config: raw ``config.json`` of the result.
            step: the layer step, from :meth:`attention`; None where no tensor needs one.
            buffers: regular expression for the names of tensors that are not needed.

        Raises:
            UnsupportedError: the host has no place for a tensor.
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
            raise self.refuse(f"there is no tensor {missing[0]} to make {new} from; fetch it again")
        self._used.update(olds)
        return True


def with_class_prefix(family: Family) -> str:
    """The layer prefix in the class; the checkpoint's may differ."""
    from rehead.models.families.table import FAMILIES

    return FAMILIES[family.model_type].layer


def transpose(weight: Tensor) -> Tensor:
    """[in, out] as [out, in]."""
    return weight.T.contiguous()
