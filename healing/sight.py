"""What one layer of the original shows on the calibration text: its moments, how it rotates, logits to match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rehead.healing.logits import LogitModel, LogitTargets
from rehead.healing.moments import Gatherer, Moments
from rehead.healing.rotation import Rotation, rotation_of
from rehead.healing.runner import Runner, TextState, with_one
from rehead.models.heads import Heads
from rehead.models.watch import Seen

#: Queries of a short sequence whose attention is looked at; their keys are all there.
QUERY_ROWS = 64
#: Tokens for the moments of attention itself.
_ATTENTION_TOKENS = {"cpu": 16384, "cuda": 65536}
#: Memory for the logits that the refit matches, and the most queries whose logits it matches.
_LOGIT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
LOGIT_QUERIES = {"cpu": 48 * QUERY_ROWS, "cuda": 192 * QUERY_ROWS}


def gather_moments(
    runner: Runner,
    layer: int,
    heads: Heads,
    state: TextState,
    inputs: Sequence[Tensor],
    needs: Sequence[str],
    groups: int,
    rotation: Rotation | None,
) -> Moments:
    """Gather a loaded layer's moments.

    Args:
        heads: the layer's weights.
        state: the text before the layer.
        inputs: what its attention reads there [N, S, n], one for each length; see :meth:`Runner.attention_inputs`.
        needs: names of moments (:data:`~rehead.healing.moments.MOMENTS`).
        groups: of neighbouring query heads; their number bounds the memory, [groups, w, w] for a moment.
        rotation: how the layer rotates; see :func:`geometry`.
    """
    width, device = inputs[0].shape[-1] + 1, runner.device
    gatherer = Gatherer(needs, groups, heads.o, rotation)
    # What attention makes of the inputs costs far more to gather than the inputs themselves, and less will do.
    enough = max(_ATTENTION_TOKENS.get(device.type, 16384), 8 * width) // len(inputs)
    for index, part in enumerate(inputs):
        every = max(1, part.shape[0] * part.shape[1] // enough)
        for number, rows in enumerate(runner.batches(part)):
            x = with_one(part[rows].to(device))
            gatherer.add_inputs(x)
            if number % every or not gatherer.attends:
                continue
            at = spread(x.shape[1], queries_of(x.shape[1]), number, device)

            def see(seen: Seen, x: Tensor = x) -> None:
                gatherer.add_attention(x, seen)

            runner.look(layer, state, index, rows, at, see)
    return gatherer.finish()


def geometry(runner: Runner, layer: int, heads: Heads, state: TextState) -> tuple[Rotation | None, float | None]:
    """How a loaded layer rotates and scales.

    Returns:
        (its rotation, or None where the model does not show it; the factor on its dot products, proved on numbers, or
        None where its logits are not what we compute from the two).
    """
    lengths = [part.shape[1] for part in state.hidden]
    longest = lengths.index(max(lengths))
    rotation = rotation_of(runner, layer, heads, lengths[longest])
    if rotation is None or heads.key_norm != "none":
        return rotation, None
    for length in lengths:  # a rope that depends on the length of the sequence is not one function of position
        other = rotation_of(runner, layer, heads, length)
        if other is None or not torch.allclose(other.factors, rotation.factors[: len(other.factors)], atol=1e-6):
            return rotation, None
    at, first = spread(lengths[longest], QUERY_ROWS, 0, runner.device), slice(0, 1)
    seen = runner.seen(layer, state, longest, first, at)
    if seen is None:
        return rotation, None
    x = with_one(runner.attention_input(layer, state, longest, first))
    model = LogitModel(rotation, seen.scaling)
    q, k = model.weights(heads)
    computed = model.scores(model.states(x, q, at), model.states(x, k))
    mask = seen.visible.expand_as(seen.scores)
    gap = (computed - seen.scores)[mask].abs().max() / seen.scores[mask].abs().max().clamp_min(1e-6)
    return rotation, seen.scaling if float(gap) < 1e-3 else None


def logit_targets(
    runner: Runner, layer: int, state: TextState, inputs: Sequence[Tensor], num_heads: int, order: Tensor | None
) -> list[LogitTargets]:
    """Logits of a loaded layer on its own text, to be matched from the changed layer's inputs.

    Args:
        state: the original's text before the layer.
        inputs: what the changed layer's attention reads [N, S, n], one for each length.
        num_heads: query heads.
        order: int64 [H], the query head behind each of the changed layer's; None where they have not changed places.
    """
    targets = []
    for index, part in enumerate(state.hidden):
        count, queries = logit_share(part, num_heads, len(state.hidden), runner.device.type)
        chosen = torch.linspace(0, len(part) - 1, count).long()
        for number, rows in enumerate(chosen.split(min(8, runner.batch_rows(part)))):
            at = spread(part.shape[1], queries, number, runner.device)
            seen = runner.seen(layer, state, index, rows, at)
            assert seen is not None
            x = with_one(inputs[index][rows].to(runner.device))
            targets.append(LogitTargets(x, at, ordered(seen.probabilities, order), ordered(seen.scores, order)))
    return targets


def logit_share(part: Tensor, num_heads: int, lengths: int, device: str) -> tuple[int, int]:
    """(sequences of one length [N, S, ...] that logits are matched on, queries of each).

    Every length gets as many queries for its tokens: what lies far back is seen in long ones alone.
    """
    have, length = part.shape[:2]
    queries = LOGIT_QUERIES.get(device, 48 * QUERY_ROWS) // lengths
    queries = min(queries, _LOGIT_BYTES.get(device, 1 << 30) // lengths // (8 * num_heads * length))
    count = max(1, min(queries // min(QUERY_ROWS, length), have))
    return count, max(1, min(queries // count, queries_of(length)))


def queries_of(length: int) -> int:
    """Queries of a sequence to look at: as many per token in long sequences as in those of 512."""
    return min(length, max(QUERY_ROWS, length // 8))


def spread(length: int, count: int, number: int, device: torch.device) -> Tensor:
    """``count`` positions spread evenly over a sequence, shifted from batch to batch so that all come up."""
    count = min(count, length)
    stride = length // count
    return torch.arange(count, device=device) * stride + number % stride


def ordered(attention: Tensor, order: Tensor | None) -> Tensor:
    """[b, H, R, S] with the heads in a new order."""
    return attention if order is None else attention[:, order.to(attention.device)]
