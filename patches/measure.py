"""The measure of a patch that does not compute the same function."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.distance import difference, distances
from rehead.models.predictions import predict


@dataclass
class Measure:
    """How far an approximate patch is from the original model.

    Attributes:
        kl: mean Kullback-Leibler divergence, original to patched, in nats a token.
        difference: largest difference of logits.
        agreement: share of tokens with the same most likely successor.
        residual: largest difference that is left with the variant switched off: the patch's own error.
    """

    kl: float
    difference: float
    agreement: float
    residual: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} nats a token, same next token {self.agreement:.1%}, logits differ by up to "
            f"{self.difference:.2e}; {self.residual:.1e} with the variant off"
        )


def measure(patch: Any, *, input_ids: Tensor | None = None, length: int | None = None) -> Measure:
    """Compare an approximate patch with the original model, and again with the variant switched off.

    Args:
        patch: an applied patch with a ``switched_off()`` that lists (record, field, exact value).
        input_ids: int ``[B, S]``; random tokens by default, which say little about text.
        length: tokens a row for the random probe.

    Raises:
        UsageError: the patch is not applied, or the model does not have these tokens.
    """
    if not patch.applied:
        raise UsageError(f"patch {patch.name!r} is not applied; measure it inside `with patch_model(...)`")
    model = patch.model
    with probing.frozen(model):
        if input_ids is None:
            input_ids = probing.probe_tokens(model, length or probing.default_length(model), 2, seed=0)
        else:
            input_ids = probing.checked_tokens(input_ids, model)
        inputs = {"input_ids": input_ids}
        with probing.unpatched(patch):
            reference = predict(model, inputs)
        variant = predict(model, inputs)
        switches = patch.switched_off()
        kept = [(record, name, getattr(record, name)) for record, name, _ in switches]
        try:
            for record, name, exact in switches:
                setattr(record, name, exact)
            off = predict(model, inputs)
        finally:
            for record, name, value in kept:
                setattr(record, name, value)
    apart = distances(reference, variant)
    return Measure(apart.mean_kl, apart.largest, apart.top1_agreement, residual=difference(reference, off))
