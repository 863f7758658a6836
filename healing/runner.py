"""Run a whole calibration text through a model's layers, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rehead.healing.layerwise import LayerwiseModel, batch_rows
from rehead.models.device_memory import empty_beside
from rehead.models.ranks import Ranks
from rehead.models.watch import PROBE, Seen, observing, until

Rows = slice | Tensor
"""Some sequences of one length: a slice, or their indices int64 [b]."""


@dataclass
class TextState:
    """Everything that one layer passes to the next, for the whole text.

    Attributes:
        hidden: hidden states [N, S, n], one tensor for each length of sequence.
        carried: for each length, what layers pass on besides, by the argument's name: mappings of tensors [N, ...]
            (the keys and values that later layers share).
    """

    hidden: list[Tensor]
    carried: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carried = self.carried or [{} for _ in self.hidden]

    def clone(self) -> TextState:
        """A copy that shares no memory."""
        return TextState(
            [empty_beside(part).copy_(part) for part in self.hidden],
            [_map(part, lambda t: t.clone()) for part in self.carried],
        )

    def at(self, index: int, rows: Rows, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """(hidden states [b, S, n], ``carried``) of some sequences, on a device."""
        return self.hidden[index][rows].to(device), self.carried_at(index, rows, device)

    def carried_at(self, index: int, rows: Rows, device: torch.device) -> dict[str, Any]:
        """``carried`` of some sequences, on a device."""
        taken: dict[str, Any] = _map(self.carried[index], lambda t: t[rows].to(device))
        return taken

    def put(self, index: int, rows: slice, hidden: Tensor, carried: dict[str, Any]) -> None:
        """Store a layer's results for some sequences, on this state's device."""
        whole = self.hidden[index]
        whole[rows].copy_(hidden)
        _store(self.carried[index], carried, rows, len(whole), whole.device)


class Runner:
    """Runs one model over the text, or over one process's share of it, one layer at a time.

    Every process has its share of each batch that a single one would run, and may have none.

    Args:
        model: the model.
        batch_tokens: tokens per forward pass.
        ranks: the processes that share the text; None: this one has all of it.
        counts: sequences of each length that they have together.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batch_tokens: int,
        ranks: Ranks | None = None,
        counts: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.ranks, self._counts = ranks or Ranks(0, 1, model.device), counts
        self.family, self.config, self.device = model.model.family, model.model.config, model.device

    def batches(self, part: Tensor) -> Iterator[slice]:
        """Slices of the sequences of one length [N, S, ...], one for each forward pass; some may be empty."""
        step, count, below = self.batch_rows(part), self.count(part), self.ranks.below
        return (slice(below(at), below(min(at + step, count))) for at in range(0, count, step))

    def batch_rows(self, part: Tensor) -> int:
        """Sequences in one forward pass over ``part`` [N, S, ...], of all processes together."""
        return batch_rows(self.count(part), part.shape[1], self.batch_tokens)

    def count(self, part: Tensor) -> int:
        """Sequences as long as those of ``part`` [N, S, ...] that all processes have together."""
        return self._counts.get(part.shape[1], len(part))

    def every_batch(self, parts: Sequence[Tensor]) -> Iterator[tuple[int, slice]]:
        """(index of a length, slice of its sequences) over all of the text."""
        every = ((index, rows) for index, part in enumerate(parts) for rows in self.batches(part))
        return ((index, rows) for index, rows in every if rows.start < rows.stop)

    def run(self, layer: int, state: TextState, watch: Callable[[int, slice, Tensor], None] | None = None) -> None:
        """Run the whole text through a loaded layer.

        Args:
            layer: the layer's index.
            state: the text before the layer; overwritten with that after it.
            watch: called after each batch with (index of its length, its sequences, the layer's output [b, S, n]).
        """
        for index, rows in self.every_batch(state.hidden):
            hidden, carried = state.at(index, rows, self.device)
            output = self.model.run_layer(layer, hidden, carried=carried)
            if watch is not None:
                watch(index, rows, output)
            state.put(index, rows, output, carried)

    def call(self, layer: int, state: TextState, index: int, rows: Rows, implementation: str | None = None) -> Tensor:
        """A loaded layer's output [b, S, n] on some sequences; ``state`` is not changed."""
        hidden, carried = state.at(index, rows, self.device)
        return self.model.run_layer(layer, hidden, implementation, carried)

    def modules(self, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """A layer's (attention, query or fused projection or what else reads the attention's input, output
        projection)."""
        attention = self.model.layers[layer].get_submodule(self.family.attention.rstrip("."))
        named, names = dict(attention.named_modules()), self.family.names
        return attention, named.get(names.query, attention), named[names.output]

    def attention_inputs(self, layer: int, state: TextState) -> list[Tensor]:
        """The attention's inputs (after the norm) on the whole text: [N, S, n] for each length."""
        inputs = [empty_beside(part) for part in state.hidden]
        for index, rows in self.every_batch(state.hidden):
            inputs[index][rows].copy_(self.attention_input(layer, state, index, rows))
        return inputs

    def attention_input(self, layer: int, state: TextState, index: int, rows: Rows) -> Tensor:
        """The attention's input [b, S, n] (after the norm) on some sequences, on the layer's device."""
        return self._read(self.modules(layer)[1], layer, state, index, rows)

    def head_outputs(self, layer: int, state: TextState, index: int, rows: Rows) -> Tensor:
        """What the output projection reads on some sequences, all heads' outputs side by side: [..., H D]."""
        return self._read(self.modules(layer)[2], layer, state, index, rows)

    def _read(self, module: nn.Module, layer: int, state: TextState, index: int, rows: Rows) -> Tensor:
        """What a module of the layer reads first on some sequences; the layer runs no further."""
        read: list[Tensor] = []
        with until(module, lambda args, kwargs: read.append(args[0])):
            self.call(layer, state, index, rows)
        return read[0]

    def look(
        self, layer: int, state: TextState, index: int, rows: Rows, at: Tensor, observer: Callable[[Seen], None]
    ) -> None:
        """Call ``observer`` with what attention computes on some sequences for queries at ``at`` (int64 [R])."""
        _, _, output = self.modules(layer)
        with observing(observer, at), until(output, lambda args, kwargs: None):
            self.call(layer, state, index, rows, PROBE)

    def seen(self, layer: int, state: TextState, index: int, rows: Rows, at: Tensor) -> Seen | None:
        """What attention computes for the queries at ``at``; None where it cannot be observed."""
        seen: list[Seen] = []
        self.look(layer, state, index, rows, at, seen.append)
        return seen[0] if seen else None


def with_one(x: Tensor) -> Tensor:
    """x~ = [x, 1]: the last column multiplies biases."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a tree of mappings and sequences, with ``change`` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        copy = type(value)()
        copy.update((key, _map(item, change)) for key, item in value.items())
        return copy
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    return value


def _store(
    whole: MutableMapping[Any, Any], part: MutableMapping[Any, Any], rows: slice, count: int, device: Any
) -> None:
    """Write the tensors of some sequences into those of all ``count``, which are created at the first batch."""

    def put(old: Any, new: Any) -> Any:
        if isinstance(new, Tensor):
            old = torch.empty(count, *new.shape[1:], dtype=new.dtype, device=device) if old is None else old
            old[rows] = new.to(device)
            return old
        if isinstance(new, MutableMapping):
            old = type(new)() if old is None else old
            _store(old, new, rows, count, device)
            return old
        if isinstance(new, (tuple, list)):
            return type(new)(put(None if old is None else old[i], item) for i, item in enumerate(new))
        return new

    for key, value in part.items():
        whole[key] = put(whole.get(key), value)
