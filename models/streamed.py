"""A transformers model whose weights stay on disk: each is read where it is used and freed after that.

The model is an ordinary instance of its class, so everything that its forward pass can do (caches, encoder-decoders,
mixtures of experts) works. Its parameters are tensors without data. A torch function that takes one is given the weight
in float32, read for that call alone; an embedding reads only the rows of its tokens, and a large matrix is multiplied a
few million numbers at a time. So memory holds about one weight, whatever the size of the model.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rehead.checkpoints.source import Source
from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class

#: Numbers of one matrix in memory at a time, and bytes of weights that stay in memory once they have been read.
PIECE = 16 << 20
KEPT_BYTES = 192 << 20

#: What needs no numbers: answered from the shape.
_SHAPES = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous,
    Tensor.element_size, Tensor.__len__, Tensor.requires_grad_,
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_sparse",
        "is_quantized", "is_nested", "itemsize", "nbytes",
    )),
}  # fmt: skip
_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_PLACES = {Tensor.is_meta.__get__: "meta", Tensor.is_cuda.__get__: "cuda", Tensor.is_cpu.__get__: "cpu"}  # type: ignore[attr-defined]


class StreamedWeight(Tensor):
    """A parameter without data; see the module's text.

    Attributes:
        weight: where its numbers come from.
    """

    weight: Weight

    @classmethod
    def of(cls, like: Tensor, weight: Weight) -> StreamedWeight:
        """The stand-in for a parameter of the shape and dtype of ``like``."""
        streamed = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(cls)
        streamed.weight = weight
        return streamed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func == _DEVICE:
            return args[0].weight.device
        if func in _PLACES:
            return args[0].weight.device.type == _PLACES[func]
        args, kwargs = tree_map(_real, (args, kwargs))
        return func(*args, **kwargs)


def _real(value: Any) -> Any:
    return value.weight.read() if isinstance(value, StreamedWeight) else value


def _embedding(tokens: Tensor, table: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rows of an embedding, of which only those are read."""
    if not isinstance(table, StreamedWeight):
        return F.embedding(tokens, table, *args, **kwargs)
    if table.weight.fits:
        return F.embedding(tokens, table.weight.read())
    distinct, index = tokens.unique(return_inverse=True)
    rows = torch.cat([table.weight.rows(int(row), int(row) + 1) for row in distinct])
    return F.embedding(index, rows)


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ matrix.T + bias, a few rows of a large matrix at a time."""
    if not isinstance(matrix, StreamedWeight) or matrix.numel() <= PIECE or not matrix.weight.by_rows:
        return F.linear(x, _real(matrix), _real(bias))
    bias, step = _real(bias), max(1, PIECE // matrix.shape[1])
    out = x.new_empty(*x.shape[:-1], len(matrix))
    for start in range(0, len(matrix), step):
        rows = slice(start, min(start + step, len(matrix)))
        piece = matrix.weight.rows(rows.start, rows.stop)
        out[..., rows] = F.linear(x, piece, None if bias is None else bias[rows])
    return out


@dataclass
class _Room:
    """Bytes that may still be kept in memory."""

    left: int


@dataclass
class Weight:
    """The numbers of one parameter.

    Attributes:
        fetch: reads all of them.
        size: bytes of all of them in float32.
        room: what of them may stay in memory.
        device: where they are needed.
        source, name: the tensor that holds them as they are; None where they are computed from several.
    """

    fetch: Callable[[], Tensor]
    size: int
    room: _Room
    device: torch.device
    source: Source | None = None
    name: str = ""
    kept: Tensor | None = field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        """Whether they are in memory or will stay there once they are read."""
        return self.kept is not None or self.size <= self.room.left

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be read without the others."""
        return self.source is not None or self.kept is not None

    def read(self) -> Tensor:
        """All numbers, float32."""
        if self.kept is not None:
            return self.kept
        tensor = _wide(self.fetch()).to(self.device)
        if self.size <= self.room.left:
            self.room.left -= self.size
            self.kept = tensor
        return tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, float32."""
        if self.source is None or self.kept is not None:
            return self.read()[start:stop]
        return _wide(self.source.read_rows(self.name, start, stop)).to(self.device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def stream(source: Source, config: Any, device: torch.device | None = None) -> nn.Module:
    """A causal language model or encoder-decoder in float32 and evaluation mode whose weights are read as it runs.

    Tensors that the checkpoint lacks, such as the head of a base model, are drawn at random, the same for every model
    of that shape.

    Args:
        source: the checkpoint, which must stay open.
        config: its resolved config.
        device: where it computes; the CPU when None.

    Raises:
        UnsupportedError: the class refuses the config, or a tensor has another shape than the class gives it.
    """
    from accelerate import init_empty_weights

    device, room = device or torch.device("cpu"), _Room(KEPT_BYTES)
    kind = causal_lm_class(config)
    try:
        with quiet_transformers():
            with init_empty_weights(include_buffers=False):
                model: Any = kind(copy.deepcopy(config)).eval()
            model.tie_weights()  # what is registered in there is made anew
    except Exception as error:
        raise UnsupportedError(
            f"{source.id}: {kind.__name__} cannot be built from its config ({first_line(error)}); check config.json"
        ) from None
    model.requires_grad_(False)
    weights = dict(_weights(model, source, device, room))
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        first = next((weights[name] for name in names if name in weights), None)
        for name in names:
            like = model.get_parameter(name)
            weight = weights.get(name) or first or _drawn(names[0], like.shape, config, device, room)
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = StreamedWeight.of(like, weight)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        value = weights[name].read() if name in weights else buffer
        model.get_submodule(owner)._buffers[leaf] = value.to(device)
    return model  # type: ignore[no-any-return]


def in_memory(model: nn.Module) -> bool:
    """Whether all weights of a model of :func:`stream` have been read and stay."""
    return all(
        not isinstance(weight, StreamedWeight) or weight.weight.kept is not None for weight in model.parameters()
    )


def _drawn(name: str, shape: torch.Size, config: Any, device: torch.device, room: _Room) -> Weight:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) * float(getattr(config, "initializer_range", 0.02) or 0.02)

    return Weight(draw, 4 * shape.numel(), room, device)


def _weights(model: Any, source: Source, device: torch.device, room: _Room) -> Iterator[tuple[str, Weight]]:
    """Where each of a class's tensors comes from, by the class's name; as transformers' loader has it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    slots, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(source.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, slots)
        if target not in slots and name in slots:
            target, pattern = rename_source_key(name, [], [], prefix, slots)
        if target in slots and pattern is not None:
            groups.setdefault(target, []).append((name, pattern))
        elif target in slots:
            if tuple(slots[target].shape) != source.info(name).shape:
                raise UnsupportedError(
                    f"{source.id}: {name} is {list(source.info(name).shape)}, its class has "
                    f"{list(slots[target].shape)}; check that config.json belongs to these weights"
                )
            fetch = partial(_whole, source, name)
            stored = source if name not in getattr(source, "computed", ()) else None  # rows of a file can be read alone
            yield target, Weight(fetch, 4 * slots[target].numel(), room, device, stored, name)
    recent: list[tuple[_Group, dict[str, Tensor]]] = []
    for target, parts in groups.items():
        converter = by_pattern[parts[0][1]]
        group = _Group(model, source, target, parts, converter, recent)
        for pattern in converter.target_patterns:
            name = target.replace(converter.target_patterns[0], pattern)
            fetch = partial(group.read, name)
            yield name, Weight(fetch, 4 * slots[name].numel(), room, device)


def _whole(source: Source, name: str) -> Tensor:
    shape = source.info(name).shape
    return source.read_rows(name, 0, shape[0]) if shape else source.read(name)


def _read_wide(source: Source, name: str) -> Tensor:
    return _wide(_whole(source, name))


@dataclass(eq=False)
class _Group:
    """Tensors that transformers' loader computes from several of the checkpoint's: merged experts, split projections.

    Attributes:
        model: the model that they belong to.
        source: the checkpoint.
        target: the first of them, by the class's name.
        parts: (the checkpoint's name, the loader's pattern for it) of what they are computed from.
        converter: the loader's entry for them.
        recent: the two groups of the model that were read last, since a layer's experts are asked for one by one.
    """

    model: Any
    source: Source
    target: str
    parts: list[tuple[str, str]]
    converter: Any
    recent: list[tuple[_Group, dict[str, Tensor]]]

    def read(self, name: str) -> Tensor:
        for group, tensors in self.recent:
            if group is self:
                return tensors[name]
        del self.recent[:-1]
        converter = copy.deepcopy(self.converter)
        for part, pattern in self.parts:
            converter.add_tensor(self.target, part, pattern, partial(_read_wide, self.source, part))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        self.recent.append((self, tensors))
        return tensors[name]
