"""The measure of a patch that does not compute the same function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.distance import Distances, difference
from rehead.models.distance import distances as divergences
from rehead.models.live import LayerState, enclosing_layer
from rehead.models.positions import position_limit
from rehead.models.predictions import Predictions, predict
from rehead.models.recall import SHORTEST, Recall, RecallText, fitting, recall, recall_texts
from rehead.variants.stack import LiveVariant, ablated, off, without


@dataclass
class Measure:
    """How far an approximate patch is from the model without it.

    Attributes:
        kl: mean Kullback-Leibler divergence, original to patched, in nats per token.
        difference: largest difference of logits.
        agreement: share of tokens with the same most likely successor.
        residual: largest difference that is left with the variant switched off: the patch's own error. Where its blocks
            are fused too: what fusing adds.
        layers: layer index -> relative error of the layer's output, on the inputs that the original gives it:
            ``|changed - original| / |original|`` over all tokens.
        updates: the same as a share of what the layer adds to its input, which the stream does not hide.
        tokens: how many were measured on.
        ablated: ``kl`` without what the variant adds to make up for what it takes away (sink tokens beside a window);
            None where it adds nothing. Near ``kl``, the addition is decoration.
        recall, recall_original: what the patched model and the original copy and look up, by distance.
    """

    kl: float
    difference: float
    agreement: float
    residual: float
    layers: dict[int, float] = field(default_factory=dict)
    updates: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    ablated: float | None = None
    recall: list[Recall] = field(default_factory=list)
    recall_original: list[Recall] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        said = [
            f"KL {self.kl:.4f} nats per token, same next token {self.agreement:.1%}, logits differ by up to "
            f"{self.difference:.2e}; {self.residual:.1e} with the variant off"
        ]
        if self.ablated is not None:
            said.append(f"{self.ablated:.4f} without what it adds")
        said += [
            f"{row.kind} at {row.distance} {row.top1:.1%} of {before.top1:.1%}"
            for row, before in zip(self.recall, self.recall_original)
        ]
        return "; ".join(said)


def measure(
    parts: Sequence[LiveVariant],
    *,
    input_ids: Tensor | None = None,
    length: int | None = None,
    distances: Sequence[int] | None = None,
) -> Measure:
    """Compare a model with itself without some of its variants, and with the approximate ones switched off.

    Args:
        parts: applied variants of one model, not all exact.
        input_ids: int ``[B, S]``; random tokens by default, which say little about text.
        length: tokens a row of the random ones.
        distances: tokens back at which copying and key-value recall are tried (:mod:`rehead.models.recall`); by
            default half and twice the reach of a variant that has one, as far as the rows are as long.

    Raises:
        UsageError: the model does not have these tokens, or their rows are too short to show anything.
    """
    model = parts[0].model
    if input_ids is None:
        input_ids = probing.probe_tokens(model, length or probing.default_length(model), 2, seed=0)
    rows = probing.batches(input_ids, model)
    approximate = [part for part in parts if not part.exact]
    fixed = [part for part in parts if part.variant.settles]
    for part in approximate:
        reach = part.variant.reach(part.options)
        if rows[0].shape[1] <= reach:
            # Nothing would change, and a KL of zero would pass for a finding.
            raise UsageError(
                f"rows of {rows[0].shape[1]} tokens do not reach beyond a window of {reach}; "
                "give measure() longer input_ids"
            )

    texts = _recall_texts(approximate, rows, distances)

    def run() -> list[Predictions]:
        return [predict(model, {"input_ids": row}) for row in rows]

    with probing.frozen(model):
        changed, recalled = run(), recall(model, texts)
        with without(parts):
            references, original = run(), recall(model, texts)
        with ablated(approximate) as less:
            lessened = run() if less else None
        with without(fixed) if fixed else ExitStack():
            plain = run() if fixed else changed
            share, update = layer_errors(model, [state for part in approximate for state in part.states], rows)
            with off(approximate):
                unchanged = predict(model, {"input_ids": rows[0]})
    apart = _apart(references, changed)
    residual = difference(unchanged, references[0])
    return Measure(
        kl=apart.mean_kl,
        difference=apart.largest,
        agreement=apart.top1_agreement,
        residual=max(residual, *(difference(a, b) for a, b in zip(plain, changed))) if fixed else residual,
        layers=share,
        updates=update,
        tokens=int(input_ids.numel()),
        ablated=None if lessened is None else _apart(references, lessened).mean_kl,
        recall=recalled,
        recall_original=original,
    )


def _apart(references: list[Predictions], others: list[Predictions]) -> Distances:
    return Distances.cat([divergences(a, b) for a, b in zip(references, others)])


def _recall_texts(
    parts: Sequence[LiveVariant], rows: Sequence[Tensor], distances: Sequence[int] | None
) -> list[RecallText]:
    """Texts to recall from, at distances that were asked for or that the variants' reach suggests."""
    model = parts[0].model
    if distances is None:
        reaches = {part.variant.reach(part.options) for part in parts}
        suggested = sorted({half for reach in reaches if reach for half in (reach // 2, 2 * reach)})
        distances = [d for d in fitting(suggested, model) if SHORTEST <= d <= rows[0].shape[1]]
    elif len(fits := fitting(distances, model)) < len(distances):
        beyond = next(distance for distance in distances if distance not in fits)
        raise UsageError(f"recall at a distance of {beyond}: the model has positions for {position_limit(model)}")
    return recall_texts(torch.cat([row.flatten() for row in rows]), distances)


@torch.no_grad()
def layer_errors(
    model: nn.Module, states: Sequence[LayerState], rows: Sequence[Tensor]
) -> tuple[dict[int, float], dict[int, float]]:
    """Relative errors of changed layers' outputs on the inputs that the *original* model gives them.

    Args:
        model: a model whose variants can be switched.
        states: what was done to it; what belongs to no layer is left out.
        rows: int ``[B, S]`` each.

    Returns:
        (layer -> share of the output, layer -> share of what the layer adds).
    """
    groups: dict[str, list[LayerState]] = {}
    for state in states:
        place = enclosing_layer(model, state.name)
        if place is not None and state.index is not None:
            groups.setdefault(place[0], []).append(state)
    sums = {group[0].index: torch.zeros(3, dtype=torch.float64) for group in groups.values()}
    before = [(state, state.enabled, state.calls) for state in states]

    def compare(group: list[LayerState]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = kwargs.get("hidden_states", args[0] if args else None)
            for state in group:
                state.enabled = True
            try:
                # The layer's own forward, past this hook.
                other = _tensor(module.forward(*args, **kwargs))
            finally:
                for state in group:
                    state.enabled = False
            first, second, x = _tensor(output).double(), other.double(), _tensor(given).double()
            values = [(second - first).square().sum(), first.square().sum(), (first - x).square().sum()]
            sums[group[0].index] += torch.stack(values).cpu()

        return hook

    with ExitStack() as stack:
        for state, _, _ in before:
            state.enabled = False
        try:
            for name, group in groups.items():
                hook = model.get_submodule(name).register_forward_hook(compare(group), with_kwargs=True)
                stack.callback(hook.remove)
            for row in rows:
                predict(model, {"input_ids": row})
        finally:
            for state, enabled, calls in before:
                state.enabled, state.calls = enabled, calls
    share = {index: float((s[0] / s[1].clamp_min(1e-30)).sqrt()) for index, s in sums.items() if index is not None}
    update = {index: float((s[0] / s[2].clamp_min(1e-30)).sqrt()) for index, s in sums.items() if index is not None}
    return share, update


def _tensor(value: Any) -> Tensor:
    """A layer's hidden states: the tensor itself, or the first of a tuple."""
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(tensor, Tensor)
    return tensor
