"""What one layer's attention sees on the calibration text, and running it up to where that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rehead.convert.planning import Plan
from rehead.healing.layerwise import LayerwiseModel, batch_rows
from rehead.healing.moments import LayerStatistics, StatisticsGatherer
from rehead.healing.refit import LogitModel, Rotation
from rehead.models.heads import Heads
from rehead.models.watch import PROBE, Seen, observing

#: Queries of a short sequence whose attention is looked at; their keys are all there.
QUERY_ROWS = 64
#: Tokens for the statistics of attention itself.
_ATTENTION_TOKENS = {"cpu": 16384, "cuda": 65536}


class Stop(Exception):
    """What was wanted of a forward pass has been seen."""


class LayerSight:
    """Runs layers of two models over the text and says what the original's attention does there.

    Hidden states of the whole text are a list of tensors [N, S, n], one for each length of sequence.

    Args:
        plan: the conversion.
        original, converted: the two models, of which the layer at hand is loaded in ``original``.
        batch_tokens: tokens in one forward pass.
    """

    def __init__(self, plan: Plan, original: LayerwiseModel, converted: LayerwiseModel, batch_tokens: int) -> None:
        self.plan, self.original, self.converted, self.batch_tokens = plan, original, converted, batch_tokens
        self.model, self.options = plan.model, plan.options
        self.device = original.device

    # ---- running

    def batches(self, part: Tensor) -> Iterator[slice]:
        """Slices of the sequences of one length [N, S, ...], a forward pass each."""
        step = batch_rows(part, self.batch_tokens)
        return (slice(at, at + step) for at in range(0, len(part), step))

    def every_batch(self, states: Sequence[Tensor]) -> Iterator[tuple[int, slice]]:
        """(index of a length, slice of its sequences) over all of the text."""
        return ((index, rows) for index, part in enumerate(states) for rows in self.batches(part))

    def run(self, model: LayerwiseModel, layer: int, hidden: list[Tensor]) -> list[Tensor]:
        """A loaded layer over all of the text; ``hidden`` is overwritten with the result."""
        for part in hidden:
            for rows in self.batches(part):
                part[rows] = model.run_layer(layer, part[rows].to(self.device)).to(part.device)
        return hidden

    def glimpse(
        self, model: LayerwiseModel, layer: int, hidden: Tensor, handle: Any, implementation: str | None = None
    ) -> None:
        """Run a loaded layer on some sequences until a hook has seen enough and stops it; the hook is removed."""
        with hooked(handle), suppress(Stop):
            model.run_layer(layer, hidden.to(self.device), implementation)

    def modules(self, model: LayerwiseModel, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """(attention, the projection that reads its input, the output projection)."""
        family = self.model.family
        attention = model.layers[layer].get_submodule(family.attention.rstrip("."))
        return attention, attention.get_submodule(family.names.query), attention.get_submodule(family.names.output)

    # ---- what the layer sees

    def inputs_of(self, layer: int, ours: Sequence[Tensor]) -> list[Tensor]:
        """The attention's inputs on the converted prefix, as ``ours``."""
        _, reader, _ = self.modules(self.original, layer)
        found = [torch.empty_like(part) for part in ours]

        for index, rows in self.every_batch(ours):

            def keep(module: nn.Module, args: tuple[Tensor, ...], into: Tensor = found[index][rows]) -> None:
                into.copy_(args[0])
                raise Stop

            self.glimpse(self.original, layer, ours[index][rows], reader.register_forward_pre_hook(keep))
        return found

    def statistics(
        self,
        layer: int,
        ours: list[Tensor],
        inputs: list[Tensor],
        kv: int,
        rotation: Rotation | None,
        order: Tensor | None,
    ) -> LayerStatistics:
        width = inputs[0].shape[-1] + 1
        gatherer = StatisticsGatherer(width, kv, self.device)
        # What attention makes of the inputs costs far more to gather than the inputs themselves, and less will do.
        enough = max(_ATTENTION_TOKENS.get(self.device.type, 16384), 8 * width) // len(inputs)
        for part, mine in zip(inputs, ours):
            every = max(1, part.shape[0] * part.shape[1] // enough)
            for number, rows in enumerate(self.batches(part)):
                x = with_one(part[rows].to(self.device))
                gatherer.add_inputs(x)
                if number % every:
                    continue
                looked_at = spread(x.shape[1], queries_of(x.shape[1]), number, self.device)

                def see(seen: Seen, x: Tensor = x) -> None:
                    gatherer.add_attention(x, ordered(seen.probabilities, order))

                self._look(layer, mine[rows], looked_at, see)
        angles = None
        if rotation is not None and len(rotation.pairs) and len(rotation.factors) > 1:
            angles = (rotation.factors[1] / rotation.factors[0]).angle().cpu()
        return gatherer.finish(angles, max(part.shape[1] for part in inputs))

    def geometry(self, layer: int, heads: Heads, hidden: list[Tensor]) -> tuple[Rotation | None, float | None]:
        """How the layer rotates and scales, proved on numbers: None where its logits are not what we compute."""
        longest = max(hidden, key=lambda part: part.shape[1])
        rotations = [self._rotation(layer, heads, part.shape[1]) for part in hidden]
        rotation = self._rotation(layer, heads, longest.shape[1])
        if rotation is None or heads.key_norm != "none":
            return rotation, None
        for other in rotations:  # a rope that depends on the length of the sequence is not one function of position
            if other is None or not torch.allclose(other.factors, rotation.factors[: len(other.factors)], atol=1e-6):
                return rotation, None
        at = spread(longest.shape[1], QUERY_ROWS, 0, self.device)
        seen = self.seen(layer, longest[:1], at)
        if seen is None:
            return rotation, None
        x = with_one(self.inputs_of(layer, [longest[:1]])[0].to(self.device))
        model = LogitModel(rotation, seen.scaling)
        q, k = model.weights(heads)
        ours, theirs = model.scores(model.states(x, q, at), model.states(x, k)), seen.scores
        mask = seen.visible.expand_as(theirs)
        gap = (ours - theirs)[mask].abs().max() / theirs[mask].abs().max().clamp_min(1e-6)
        return rotation, seen.scaling if float(gap) < 1e-3 else None

    def _rotation(self, layer: int, heads: Heads, length: int) -> Rotation | None:
        """The model's own rotary factors for this layer, from what the layer is called with."""
        pairs = heads.pairs
        if pairs is None or not len(pairs):
            return Rotation(torch.ones(length, 0, dtype=torch.complex64, device=self.device), torch.empty(0, 2).long())
        call = self.original.calls[self.original.default, length][layer]
        given = call.kwargs.get("position_embeddings")
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
            return None
        cos, sin = (part.float().reshape(-1, *part.shape[-2:])[0] for part in given)
        count = len(pairs)
        if cos.shape[-1] == 2 * count:
            twice = bool(torch.equal(cos[:, 0::2], cos[:, 1::2]))
            cos, sin = (part[:, 0::2] if twice else part[:, :count] for part in (cos, sin))
        if cos.shape[-1] != count or len(cos) < length:
            return None
        return Rotation(torch.complex(cos, sin)[:length].to(self.device), pairs.to(self.device))

    def _look(self, layer: int, hidden: Tensor, at: Tensor, observer: Callable[[Seen], None]) -> None:
        """Show what the original's attention computes on a few sequences for the queries at some positions."""
        _, _, output = self.modules(self.original, layer)
        with observing(observer, at):
            self.glimpse(self.original, layer, hidden, output.register_forward_pre_hook(_stop), PROBE)

    def seen(self, layer: int, hidden: Tensor, at: Tensor) -> Seen | None:
        """The same, as a value; None where it cannot be observed."""
        found: list[Seen] = []
        self._look(layer, hidden, at, found.append)
        return found[0] if found else None


def queries_of(length: int) -> int:
    """Queries of a sequence to look at: as many a token in long sequences as in those of 512."""
    return min(length, max(QUERY_ROWS, length // 8))


def spread(length: int, count: int, number: int, device: torch.device) -> Tensor:
    """``count`` positions spread evenly over a sequence, shifted from batch to batch so that all come up."""
    count = min(count, length)
    stride = length // count
    return torch.arange(count, device=device) * stride + number % stride


def ordered(attention: Tensor, order: Tensor | None) -> Tensor:
    """[b, H, R, S] with the heads in a new order."""
    return attention if order is None else attention[:, order.to(attention.device)]


def with_one(x: Tensor) -> Tensor:
    """x~ = [x, 1]: the one carries biases."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _stop(module: nn.Module, args: Any) -> None:
    raise Stop


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
