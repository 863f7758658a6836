"""What is said about a patched model: one record for each layer, and all of them with what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rehead.models.live import LayerState
from rehead.patches.measure import Measure


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a patched model.

    Attributes:
        name: of the attention module or block in the model.
        index: of the decoder layer that it is or belongs to.
        module: its class.
        was, now: what it computed before and computes now: attention implementations, or forms of a block.
        how: the way it was changed.
        calls: times that the change ran in eager mode (a compiled graph does not count).
        error: relative error of the layer's output, once measured.
        update_error: the same as a share of what the layer adds to its input.
    """

    name: str
    index: int | None
    module: str
    was: str
    now: str
    how: str
    calls: int
    error: float | None = None
    update_error: float | None = None


def records(states: Iterable[LayerState], measured: Measure | None = None) -> list[LayerRecord]:
    """One record for each module, of all that was done to it; ``states`` in the order in which it was done."""
    groups: dict[str, list[LayerState]] = {}
    for state in states:
        groups.setdefault(state.name, []).append(state)
    made = []
    for name, group in groups.items():
        first, last = group[0], group[-1]
        now = " + ".join(dict.fromkeys(state.now for state in group))
        error = update = None
        if measured is not None and last.index is not None:
            error, update = measured.layers.get(last.index, 0.0), measured.updates.get(last.index, 0.0)
        made.append(LayerRecord(name, last.index, last.module, first.was, now, last.how, last.calls, error, update))
    return made


@dataclass
class PatchReport:
    """What a patch did, layer by layer.

    Attributes:
        measured: how far off the model is, once that was measured, ``on`` which tokens.
        untouched: attention modules or blocks that are left alone.
    """

    patch: str
    model: str
    applied: bool
    exact: bool
    layers: list[LayerRecord] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    measured: Measure | None = None
    on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = "exact" if self.exact else "approximate"
        state = "applied" if self.applied else "not applied"
        lines = [f"{self.patch} on {self.model}: {state}, {kind}, {len(self.layers)} layers"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            off = "" if layer.error is None else f", off by {layer.error:.2%} ({layer.update_error:.1%} of its update)"
            lines.append(
                f"  {layer.name:<{width}}  {layer.module}: {layer.was} -> {layer.now} ({layer.how}), "
                f"{layer.calls} calls{off}"
            )
        if self.measured is not None:
            lines.append(f"  {self.measured}; {self.measured.tokens} tokens of {self.on}")
        if self.untouched:
            named = self.untouched if len(self.untouched) <= 4 else [f"{len(self.untouched)} modules"]
            lines.append(f"  left as they are: {', '.join(named)}")
        return "\n".join(lines)
