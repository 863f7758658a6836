"""In which layers a variant loses least, measured on the model itself."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rehead.console import Progress
from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.distance import Distances, distances
from rehead.models.predictions import Predictions, predict
from rehead.models.recall import RecallText
from rehead.variants.stack import LiveVariant


@dataclass(frozen=True)
class LayerLoss:
    """What changing one layer alone costs: ``kl`` in nats per token, original to changed."""

    layer: int
    kl: float


@dataclass(frozen=True)
class Choice:
    """Layers to change.

    Attributes:
        layers: chosen, ascending.
        kl: of the model with all of them changed, in nats per token.
        path: (layer, KL of the model with it and all before it changed), in the order of choice.
        alone: every layer changed alone, cheapest first.
        compared: KL of as many layers chosen plainly, by name: the first, the last, every so many; of all chosen by
            taking layers away (``backward``) and by adding them (``forward``).
    """

    layers: list[int]
    kl: float
    path: list[tuple[int, float]] = field(default_factory=list)
    alone: list[LayerLoss] = field(default_factory=list)
    compared: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class LayerSwitch:
    """A live model under a variant that is switched a set of layers at a time, and measured.

    A context manager: outside it, the model is as it was, bit for bit.

    Args:
        live: a variant of all layers of a model, not applied.
        input_ids: int ``[B, S]`` calibration tokens. Their logits are kept: ``B S V`` numbers in the model's dtype.
        recalled: texts to recall from, whose divergence counts as much as that of the calibration tokens: what a window
            costs where prose does not show it.

    Raises:
        UnsupportedError: the model cannot be changed this way.
        UsageError: bad tokens, or the variant changes nothing.
    """

    def __init__(self, live: LiveVariant, input_ids: Tensor, recalled: Sequence[RecallText] = ()) -> None:
        self.live, self._recalled = live, list(recalled)
        self._parts = probing.batches(input_ids, live.model)
        self._reference: list[Predictions] = []
        self._recall: list[Predictions] = []
        self.layers: list[int] = []

    def __enter__(self) -> LayerSwitch:
        with probing.frozen(self.live.model):
            self._reference = [self._logits(part) for part in self._parts]
            self._recall = [text.predictions(self.live.model) for text in self._recalled]
        self.live.apply()
        try:
            self.live.calibrate(torch.cat(self._parts), sequential=False)
        except BaseException:
            self.live.revert()
            raise
        self.layers = sorted({state.index for state in self.live.states if state.index is not None})
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.revert()
        self._reference, self._recall = [], []

    def _logits(self, tokens: Tensor) -> Predictions:
        return predict(self.live.model, {"input_ids": tokens})

    def kl(self, layers: Iterable[int]) -> float:
        """Nats per token between the original model and the one with ``layers`` switched, with those per recalled token
        added; infinite where it overflows."""
        with self.live.only(layers), probing.frozen(self.live.model):
            pairs = zip(self._parts, self._reference)
            kl = Distances.cat([distances(reference, self._logits(part)) for part, reference in pairs]).mean_kl
            if self._recalled:
                texts = zip(self._recalled, self._recall)
                apart = [distances(reference, text.predictions(self.live.model)) for text, reference in texts]
                kl += Distances.cat(apart).mean_kl
        # What is no number would compare as neither more nor less than any other.
        return kl if math.isfinite(kl) else math.inf


def _rank(switch: LayerSwitch, progress: Progress | None) -> list[LayerLoss]:
    losses = []
    for done, layer in enumerate(switch.layers):
        if progress is not None:
            progress("ranking layers", done, len(switch.layers))
        losses.append(LayerLoss(layer, switch.kl([layer])))
    if progress is not None:
        progress("ranking layers", len(switch.layers), len(switch.layers))
    return sorted(losses, key=lambda loss: (loss.kl, loss.layer))


def choose_layers(
    live: LiveVariant,
    input_ids: Tensor,
    *,
    kl_budget: float | None = None,
    count: int | None = None,
    exhaustive: bool = False,
    recalled: Sequence[RecallText] = (),
    progress: Progress | None = None,
) -> Choice:
    """Choose layers greedily: next, always the one that adds least to the model's loss.

    The loss of a set is measured, never summed up from its layers. By default only layers whose last measured cost
    could still be the least are measured again (lazily: costs tend to grow with the set, which makes the stale ones
    lower bounds); that takes about two passes over the tokens for each layer chosen.

    Args:
        live: a variant of all layers of a model, not applied; the model is left as it was.
        input_ids: int ``[B, S]`` calibration tokens.
        kl_budget: stop before the model's loss exceeds this, in nats per token.
        count: stop at this many layers, or before the first that leaves no finite loss.
        exhaustive: measure every remaining layer at every step.
        recalled: texts to recall from; see :class:`LayerSwitch`. With them and a count, the choice is also made by
            taking layers away from all of them, and compared with plain ones; the least loss wins.
        progress: called with ("choosing layers", chosen, at most).

    Raises:
        UsageError: neither a budget nor a count, or a negative one.
        Otherwise as :class:`LayerSwitch`.
    """
    if kl_budget is None and count is None:
        raise UsageError("choosing layers needs a limit; give kl_budget= or count=")
    if (kl_budget is not None and not kl_budget >= 0) or (count is not None and count < 0):
        raise UsageError("kl_budget and count cannot be negative; give a larger one")
    with LayerSwitch(live, input_ids, recalled) as switch:
        alone = _rank(switch, progress)
        most = len(alone) if count is None else min(count, len(alone))
        path: list[tuple[int, float]] = []
        # (cost added when last measured, layer, how many were chosen then)
        queue = [(loss.kl, loss.layer, 0) for loss in alone]
        heapq.heapify(queue)
        total = 0.0
        while queue and len(path) < most:
            if progress is not None:
                progress("choosing layers", len(path), most)
            if exhaustive:
                chosen = [layer for layer, _ in path]
                queue = [(switch.kl([*chosen, layer]) - total, layer, len(path)) for _, layer, _ in queue]
                heapq.heapify(queue)
            added, layer, at = heapq.heappop(queue)
            if at < len(path):
                fresh = switch.kl([*(one for one, _ in path), layer]) - total
                heapq.heappush(queue, (fresh, layer, len(path)))
                continue
            if math.isinf(added) or (kl_budget is not None and total + added > kl_budget):
                break
            total += added
            path.append((layer, total))
        if progress is not None:
            progress("choosing layers", most, most)
        layers, compared = sorted(layer for layer, _ in path), {}
        if recalled and count is not None and 0 < len(path) == most < len(alone):
            others = _plain(switch.layers, most) | {"backward": _backward(switch, most)}
            compared = {"forward": total} | {name: switch.kl(chosen) for name, chosen in others.items()}
            best = min(compared, key=compared.__getitem__)
            if best != "forward" and (kl_budget is None or compared[best] <= kl_budget):
                layers, total, path = sorted(others[best]), compared[best], []
    return Choice(layers, total, path, alone, compared)


def _plain(layers: Sequence[int], count: int) -> dict[str, list[int]]:
    """As many layers by rules that look at nothing, by name."""
    spread = [layers[index * len(layers) // count] for index in range(count)]
    return {"first": list(layers[:count]), "last": list(layers[-count:]), "spread": spread}


def _backward(switch: LayerSwitch, count: int) -> list[int]:
    """Layers that are left when the one whose change costs most is taken away again and again.

    Layers that hardly mattered when last measured are measured again only once they come first.
    """
    left = list(switch.layers)
    # (loss without the layer when last measured, layer, how many were left then)
    queue = [(switch.kl([one for one in left if one != layer]), layer, len(left)) for layer in left]
    heapq.heapify(queue)
    while len(left) > count:
        loss, layer, at = heapq.heappop(queue)
        if at != len(left):
            loss = switch.kl([one for one in left if one != layer])
            heapq.heappush(queue, (loss, layer, len(left)))
            continue
        left.remove(layer)
    return left
