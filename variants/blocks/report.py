"""What is said about patched blocks: records, reports, proofs."""

from __future__ import annotations

from dataclasses import dataclass, field

from rehead.patches import prove as proof
from rehead.patches.patch import LayerRecord, PatchReport
from rehead.variants.blocks.measure import BlockMeasure


@dataclass
class BlockRecord(LayerRecord):
    """One block of a patched model; ``was`` and ``now`` are forms, ``how`` is ``"redirected"`` or ``"fused"``.

    Attributes:
        index: the layer's place in the stack.
        error: relative error of the block's output, once measured; 0 where the form did not change.
        update_error: the same as a share of what the block adds to its input.
    """

    index: int = 0
    error: float | None = None
    update_error: float | None = None


@dataclass
class BlockReport(PatchReport):
    """What was done to the blocks, and, once measured, how far off each of them and the model are."""

    measured: BlockMeasure | None = None
    on: str = ""
    layers: list[LayerRecord] = field(default_factory=list)

    def __str__(self) -> str:
        kind = "exact" if self.exact else "approximate"
        state = "applied" if self.applied else "not applied"
        lines = [f"{self.patch} on {self.model}: {state}, {kind}, {len(self.layers)} blocks"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            assert isinstance(layer, BlockRecord)
            off = "" if layer.error is None else f", off by {layer.error:.2%} ({layer.update_error:.1%} of its update)"
            lines.append(
                f"  {layer.name:<{width}}  {layer.module}: {layer.was} -> {layer.now} ({layer.how}), "
                f"{layer.calls} calls{off}"
            )
        if self.measured is not None:
            lines.append(f"  {self.measured}; {self.measured.tokens} tokens of {self.on}")
        if self.untouched:
            named = self.untouched if len(self.untouched) <= 4 else [f"{len(self.untouched)} blocks"]
            lines.append(f"  left as they are: {', '.join(named)}")
        return "\n".join(lines)


@dataclass
class FusionProof(proof.Proof):
    """A proof that blocks compute fused what they compute unfused, in a form that is not the model's own."""

    def __str__(self) -> str:
        return (
            f"proved: {self.layers} blocks, {self.calls} calls, difference {self.difference:.1e} to {self.against} "
            f"(allowed {self.tolerance:.1e}), leak {self.leak:.1e}; see measure() for the distance to the original"
        )
