"""Proof that a patch runs and computes the same function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from rehead.attention.install import installation
from rehead.errors import UsageError, VerificationError
from rehead.models import probing
from rehead.models.distance import difference
from rehead.models.predictions import Predictions, predict
from rehead.models.tolerance import allowance, by_rounding, rounding
from rehead.variants.stack import LiveVariant, off, stack_of, without


@dataclass
class Proof:
    """What :func:`prove` found.

    Attributes:
        layers: patched layers that the probe reaches.
        calls: calls of what the patch puts there, in one forward pass.
        difference: largest difference to the unpatched logits on rows that are not padding.
        tolerance: what was allowed.
        leak: largest change of earlier logits when later tokens change, patched.
        unpatched_leak: the same for the unpatched model.
        against: what the logits were compared with: ``"unpatched"``, or ``"eager"`` where the model's own
            implementation differs from its eager attention and the patch does not, or is this attention by name.
        decoding: the same for a continuation from a cache; None where the model has no cache, or cannot use it.
        undecided: the error that the unpatched model ends in when it continues from a cache, so that nothing is proved
            of that; empty where it does not.
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
    undecided: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        note = "" if self.against == "unpatched" else f", against {self.against}"
        cached = "" if self.decoding is None else f", {self.decoding:.1e} from a cache"
        cached = f", from a cache nothing (unpatched it fails: {self.undecided})" if self.undecided else cached
        return (
            f"proved: {self.layers} layers, {self.calls} calls, difference {self.difference:.1e}{cached} "
            f"(allowed {self.tolerance:.1e}), leak {self.leak:.1e}{note}"
        )


@contextmanager
def _alone(parts: Sequence[LiveVariant]) -> Iterator[None]:
    """Inside the block no other variant is in front of a model's attention, where that is what is proved."""
    others = []
    if any(part.variant.attend is not None for part in parts):
        others = [live for live in stack_of(parts[0].model) if live.variant.attend is not None and live not in parts]
    with off(others):
        yield


def prove(
    parts: Sequence[LiveVariant],
    *,
    input_ids: Tensor | None = None,
    length: int | None = None,
    tolerance: float | None = None,
    padding: bool = True,
) -> Proof:
    """Compare a patched model with itself unpatched, on the same tokens.

    Three things are required: every patched layer that the unpatched model runs calls what the patch puts there; the
    logits agree on rows that are not padding, without and with left padding, and from a cache where the model has one
    (with the unpatched model's, or with eager attention's where its own implementation differs from that); and logits
    before a changed token do not move (by no more than they do in the unpatched model, where routing of experts can
    shift rounding).

    Other patches of the model stay, but for what they do to attention where that is what is proved.

    Args:
        parts: applied, exact variants of one model.
        input_ids: int ``[B, S]``; random tokens by default.
        length: tokens a row for the random probe; by default enough to pass a short window.
        tolerance: largest difference as a share of the largest logit. By default 1e-9, 1e-5, 5e-3 and 4e-2 for logits
            in float64, float32, float16 and bfloat16; in the latter two also twice what one more rounding of each
            layer's output does to them.
        padding: also compare with the first row padded on the left.

    Raises:
        VerificationError: with the one thing that failed.
        UsageError: the model cannot be probed with token ids.
    """
    with _alone(parts), probing.frozen(parts[0].model):
        return _prove(parts, input_ids, length, tolerance, padding)


def _prove(
    parts: Sequence[LiveVariant], input_ids: Tensor | None, length: int | None, tolerance: float | None, padding: bool
) -> Proof:
    model = parts[0].model
    states = [state for part in parts for state in part.states]
    names = list(dict.fromkeys(state.name for state in states))
    probe = probing.make_probe(model, input_ids, length, padding)
    # First as the model is: taking the patch off and putting it back would repair what somebody changed since.
    before = [state.calls for state in states]
    plain = _plain_logits(model, probe)
    calls = dict.fromkeys(names, 0)
    for state, count in zip(states, before):
        calls[state.name] += state.calls - count
    mine = probing.run_probe(model, probe, plain)
    # A model that was loaded under this attention's name would be held to itself.
    shared = installation(model) if any(part.variant.attend is not None for part in parts) else None
    eager = shared is not None and shared.by_name
    with without(parts), probing.eager_attention(model) if eager else nullcontext():
        theirs, reached = probing.called(model, names, lambda: probing.run_probe(model, probe))
        theirs.cached, failed = probing.continued_if_it_can(model, probe)
    if theirs.cached is not None:
        mine.cached = probing.continued(model, probe)
    silent = [name for name in names if name in reached and not calls[name]]
    if silent:
        raise VerificationError(
            f"{silent[0]}{f' and {len(silent) - 1} more layers' if len(silent) > 1 else ''} ran without calling "
            "what the patch puts there: the model ignores it, or attn_implementation was set again; revert the patch"
        )
    if not reached:
        raise VerificationError(
            "no patched layer ran on the probe, so nothing is proved; pass input_ids that reach them"
        )
    limit = allowance(theirs.plain, tolerance)
    gap = probing.gap_of(mine, theirs, probe)
    if not gap <= limit and not eager and shared is not None:
        # Some attention implementations drop what they cannot do (a soft cap, under SDPA in older transformers).
        # Eager attention is the definition, so agreement with it is what counts.
        with without(parts), probing.eager_attention(model):
            definition = probing.run_probe(model, probe)
            definition.cached, _ = probing.continued_if_it_can(model, probe)
        if probing.gap_of(mine, definition, probe) < gap:
            gap, eager, theirs = probing.gap_of(mine, definition, probe), True, definition
    if not gap <= limit and tolerance is None:
        with without(parts), probing.eager_attention(model) if eager else nullcontext():
            moved = rounding(model, sorted(reached), probe.plain, theirs.plain)
        limit = max(limit, by_rounding(model, moved, theirs.plain))
    if not gap <= limit:
        raise VerificationError(
            f"the patched logits differ from the unpatched ones by {gap:.2e}, over the {limit:.2e} allowed; "
            "revert the patch and report the model type"
        )
    leak, unpatched_leak = (difference(x.plain[:, : probe.cut], x.changed[:, : probe.cut]) for x in (mine, theirs))
    # Other products round otherwise; another attention must not see what comes later at all.
    if leak > 4 * unpatched_leak and (shared is not None or leak > limit):
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
        against="eager" if eager else "unpatched",
        decoding=probing.cached_gap(mine, theirs),
        undecided=failed,
    )


def _plain_logits(model: nn.Module, probe: probing.Probe) -> Predictions:
    try:
        return predict(model, probe.plain)
    except IndexError as error:
        shape = " x ".join(map(str, probe.plain["input_ids"].shape))
        raise UsageError(
            f"{type(model).__name__} cannot look up tokens or positions of a probe of {shape} tokens ({error}); "
            "pass a smaller length=, or input_ids= it knows"
        ) from error
