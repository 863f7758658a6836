"""Proof that a patch runs and computes the same function."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rehead.errors import UsageError, VerificationError
from rehead.models import probing
from rehead.models.distance import difference
from rehead.models.predictions import Predictions, predict

if TYPE_CHECKING:
    from rehead.patches.patch import Patch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest allowed difference of logits, as a share of their largest magnitude (at least 1)."""

ROUNDINGS = 2
"""How many times as far as one more rounding a layer moves them logits in 16 bits may differ."""


@dataclass
class Proof:
    """What :func:`prove` found.

    Attributes:
        layers: attention layers that the probe reaches.
        calls: calls of the patched attention in one forward pass.
        difference: largest difference to the unpatched logits on rows that are not padding.
        tolerance: what was allowed.
        leak: largest change of earlier logits when later tokens change, patched.
        unpatched_leak: the same for the unpatched model.
        against: what the logits were compared with: ``"unpatched"``, or ``"eager"`` where the model's own
            implementation differs from its eager attention and the patch does not, or is this attention by name.
        decoding: the same for a continuation from a cache; None where the model has no cache.
        unreached: patched layers that neither model calls on this input (cross-attention without an encoder, say).
    """

    layers: int
    calls: int
    difference: float
    tolerance: float
    leak: float
    unpatched_leak: float
    unreached: list[str]
    against: str = "unpatched"
    decoding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        note = "" if self.against == "unpatched" else f", against {self.against}"
        cached = "" if self.decoding is None else f", {self.decoding:.1e} from a cache"
        return (
            f"proved: {self.layers} layers, {self.calls} calls, difference {self.difference:.1e}{cached} "
            f"(allowed {self.tolerance:.1e}), leak {self.leak:.1e}{note}"
        )


def allowance(plain: Predictions, tolerance: float | None = None) -> float:
    """What logits may differ by: a share of their largest, ``tolerance`` or by their dtype (:data:`TOLERANCE`)."""
    return probing.allowed(plain, TOLERANCE.get(plain.dtype, 1e-5) if tolerance is None else tolerance)


def by_rounding(model: nn.Module, moved: float, plain: Predictions) -> float:
    """What logits may differ by for no other reason than 16 bits; 0 for a model in float32 or float64.

    Args:
        model: what a patched model is held to.
        moved: what :func:`probing.rounding` finds in it.
        plain: its predictions.

    Raises:
        VerificationError: rounding alone moves them about as far as they go, so that they prove nothing.
    """
    largest = probing.allowed(plain, 1.0)
    if not ROUNDINGS * moved <= largest / 2:
        dtype = str(probing.dtype_of(model)).removeprefix("torch.")
        raise VerificationError(
            f"{type(model).__name__} cannot be proved in {dtype}: one more rounding a layer alone moves its logits by "
            f"{moved:.1e} (the largest is {largest:.1e}); prove it in float32, model.float()"
        )
    return ROUNDINGS * moved


def prove(
    patch: Patch,
    *,
    input_ids: Tensor | None = None,
    length: int | None = None,
    tolerance: float | None = None,
    padding: bool = True,
) -> Proof:
    """Compare a patched model with itself unpatched, on the same tokens.

    Three things are required: every attention layer that the unpatched model runs calls the patched attention; the
    logits agree on rows that are not padding, without and with left padding, and from a cache where the model has one
    (with the unpatched model's, or with eager attention's where its own implementation differs from that); and logits
    before a changed token do not move (by no more than they do in the unpatched model, where routing of experts can
    shift rounding).

    Args:
        patch: an applied patch.
        input_ids: int ``[B, S]``; random tokens by default.
        length: tokens a row for the random probe; by default enough to pass a short window.
        tolerance: largest difference as a share of the largest logit. By default 1e-9, 1e-5, 5e-3 and 4e-2 for logits
            in float64, float32, float16 and bfloat16; in the latter two also twice what one more rounding of each
            attention's output does to them.
        padding: also compare with the first row padded on the left.

    Raises:
        VerificationError: with the one thing that failed.
        UsageError: the patch is not applied, or the model cannot be probed with token ids.
    """
    if not patch.applied:
        raise UsageError(f"patch {patch.name!r} is not applied; prove it inside `with patch_model(...)`")
    model = patch.model
    names = [record.name for record in patch._records]
    with probing.frozen(model):
        probe = probing.make_probe(model, input_ids, length, padding)
        # First as the model is: taking the patch off and putting it back would mend what somebody changed since.
        before = {record.name: record.calls for record in patch._records}
        try:
            plain = predict(model, probe.plain)
        except IndexError as error:
            shape = " x ".join(map(str, probe.plain["input_ids"].shape))
            raise UsageError(
                f"{type(model).__name__} cannot look up tokens or positions of a probe of {shape} tokens ({error}); "
                "pass a smaller length=, or input_ids= it knows"
            ) from error
        calls = {record.name: record.calls - before[record.name] for record in patch._records}
        mine = probing.run_probe(model, probe, plain)
        # A model that was loaded under this attention's name would be held to itself.
        named = any(record.how == "interface" and record.was == record.now for record in patch._records)
        with probing.unpatched(patch), probing.eager_attention(model) if named else nullcontext():
            theirs, reached = probing.called(model, names, lambda: probing.run_probe(model, probe))
            theirs.cached = probing.continued_if_it_can(model, probe)
        if theirs.cached is not None:
            mine.cached = probing.continued(model, probe)
        silent = [name for name in names if name in reached and not calls[name]]
        if silent:
            raise VerificationError(
                f"{silent[0]}{f' and {len(silent) - 1} more layers' if len(silent) > 1 else ''} ran without calling "
                "the patched attention: the model ignores it, or its attn_implementation was set anew; revert the patch"
            )
        if not reached:
            raise VerificationError(
                "no patched layer ran on the probe, so nothing is proved; pass input_ids that reach them"
            )
        limit = allowance(theirs.plain, tolerance)
        gap, against = probing.gap_of(mine, theirs, probe), "eager" if named else "unpatched"
        if not gap <= limit and not named:
            # Some attention implementations drop what they cannot do (a soft cap, under SDPA in older transformers).
            # Eager attention is the definition, so agreement with it is what counts.
            with probing.unpatched(patch), probing.eager_attention(model):
                eager = probing.run_probe(model, probe)
                eager.cached = probing.continued_if_it_can(model, probe)
            if probing.gap_of(mine, eager, probe) < gap:
                gap, against, theirs = probing.gap_of(mine, eager, probe), "eager", eager
        if not gap <= limit and tolerance is None:
            with probing.unpatched(patch), probing.eager_attention(model) if against == "eager" else nullcontext():
                moved = probing.rounding(model, sorted(reached), probe.plain, theirs.plain)
            limit = max(limit, by_rounding(model, moved, theirs.plain))
    if not gap <= limit:
        raise VerificationError(
            f"the patched logits differ from the unpatched ones by {gap:.2e}, over the {limit:.2e} allowed; "
            "revert the patch and report the model type"
        )
    leak, unpatched_leak = (difference(x.plain[:, : probe.cut], x.changed[:, : probe.cut]) for x in (mine, theirs))
    if leak > 4 * unpatched_leak:
        raise VerificationError(
            f"later tokens change earlier logits by {leak:.2e} (unpatched {unpatched_leak:.2e}): causality is lost; "
            "revert the patch and report the model type"
        )
    return Proof(
        layers=len(reached),
        calls=sum(calls.values()),
        difference=gap,
        tolerance=limit,
        leak=leak,
        unpatched_leak=unpatched_leak,
        unreached=[name for name in names if name not in reached],
        against=against,
        decoding=probing.cached_gap(mine, theirs),
    )
