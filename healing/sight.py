"""Observe one layer of the original on calibration text: its moments, its rotation, and the logits to match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rehead.healing.gatherer import Gatherer
from rehead.healing.logits import LogitModel, LogitTargets, Shared
from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation, rotation_of
from rehead.healing.runner import Runner, TextState, with_one
from rehead.models.heads import Heads
from rehead.models.watch import Seen

#: Observed queries per short sequence; each with all of its keys.
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
    """A loaded layer's moments on the text.

    Args:
        runner: runs the model.
        layer: the layer's index.
        heads: the layer's weights.
        state: the text before the layer.
        inputs: its attention's inputs there [N, S, n], one for each length; see :meth:`Runner.attention_inputs`.
        needs: names of moments (:data:`~rehead.healing.moments.MOMENTS`).
        groups: number of groups of neighbouring query heads; a moment takes up to [groups, w, w] of memory.
        rotation: the layer's rotation; see :func:`geometry`.
    """
    width, device = inputs[0].shape[-1] + 1, runner.device
    gatherer = Gatherer(needs, groups, heads.o, rotation)
    writes = any(moment.writes for moment in gatherer.sums.values())
    # Moments of attention cost far more than those of inputs, and fewer tokens are enough for them.
    enough = max(_ATTENTION_TOKENS.get(device.type, 16384), 8 * width) // len(inputs)
    for index, part in enumerate(inputs):
        every = max(1, runner.count(part) * part.shape[1] // enough)
        for number, rows in enumerate(runner.batches(part)):
            if rows.start == rows.stop:
                continue
            x = with_one(part[rows].to(device))
            gatherer.add_inputs(x)
            if writes:
                gatherer.add_outputs(x, runner.head_outputs(layer, state, index, rows))
            if number % every or not gatherer.attends:
                continue
            at = spread(x.shape[1], queries_of(x.shape[1]), number, device)

            def see(seen: Seen, x: Tensor = x) -> None:
                gatherer.add_attention(x, seen)

            runner.look(layer, state, index, rows, at, see)
    gatherer.share(runner.ranks)
    return gatherer.finish()


def geometry(runner: Runner, layer: int, heads: Heads, state: TextState) -> tuple[Rotation | None, float | None]:
    """A loaded layer's rotation and the factor on its dot products.

    Returns:
        (the rotation, or None if it cannot be observed; the factor, or None if logits computed with both do not equal
        the model's own).
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
    # By the text's first sequence, which the main process has.
    shown = rotation
    return rotation, runner.ranks.from_main(lambda: _scaling(runner, layer, heads, state, longest, shown))


def _scaling(
    runner: Runner, layer: int, heads: Heads, state: TextState, longest: int, rotation: Rotation
) -> float | None:
    """The factor on the dot products, as :func:`geometry` says."""
    length = state.hidden[longest].shape[1]
    at, first = spread(length, QUERY_ROWS, 0, runner.device), slice(0, 1)
    seen = runner.seen(layer, state, longest, first, at)
    if seen is None:
        return None
    x = with_one(runner.attention_input(layer, state, longest, first))
    model = LogitModel(rotation, seen.scaling)
    q, k = model.weights(heads)
    computed = model.scores(model.states(x, q, at), model.states(x, k))
    mask = seen.visible.expand_as(seen.scores)
    gap = (computed - seen.scores)[mask].abs().max() / seen.scores[mask].abs().max().clamp_min(1e-6)
    return seen.scaling if float(gap) < 1e-3 else None


def logit_targets(
    runner: Runner, layer: int, state: TextState, inputs: Sequence[Tensor], num_heads: int, order: Tensor | None
) -> list[LogitTargets]:
    """The original layer's logits on its own inputs, as targets for the changed layer on its inputs.

    Args:
        runner: runs the original.
        layer: the layer's index.
        state: the original's text before the layer.
        inputs: the inputs of the changed layer's attention [N, S, n], one for each length.
        num_heads: query heads.
        order: int64 [H], the original index of each of the changed layer's query heads; None if the order is unchanged.
    """
    targets = []
    for index, part in enumerate(state.hidden):
        have = runner.count(part)
        count, queries = logit_share(have, part.shape[1], num_heads, len(state.hidden), runner.device.type)
        sequences = torch.linspace(0, have - 1, count).long()
        for number, together in enumerate(sequences.split(min(8, runner.batch_rows(part)))):
            at = spread(part.shape[1], queries, number, runner.device)
            rows = runner.ranks.own(together)
            batch = Shared(len(together), runner.ranks.places(together)) if runner.ranks.world > 1 else None
            x = with_one(inputs[index][rows].to(runner.device))
            if not len(rows):
                targets.append(LogitTargets(x, at, [], batch))
                continue
            seen = runner.seen(layer, state, index, rows, at)
            assert seen is not None
            seen_as = (ordered(seen.probabilities, order), ordered(seen.scores, order))
            targets.append(LogitTargets.of(x, at, *seen_as, batch))
    return targets


def logit_share(have: int, length: int, num_heads: int, lengths: int, device: str) -> tuple[int, int]:
    """(number of sequences of ``have`` of one length to match logits on, queries of each).

    Every length gets an equal share of the queries, since only long sequences have distant keys.
    """
    queries = LOGIT_QUERIES.get(device, 48 * QUERY_ROWS) // lengths
    queries = min(queries, _LOGIT_BYTES.get(device, 1 << 30) // lengths // (8 * num_heads * length))
    count = max(1, min(queries // min(QUERY_ROWS, length), have))
    return count, max(1, min(queries // count, queries_of(length)))


def queries_of(length: int) -> int:
    """Number of queries to observe per sequence: 64, or one in eight tokens of sequences longer than 512."""
    return min(length, max(QUERY_ROWS, length // 8))


def spread(length: int, count: int, number: int, device: torch.device) -> Tensor:
    """``count`` positions spread evenly over a sequence, shifted by batch ``number`` so that all are used in time."""
    count = min(count, length)
    stride = length // count
    return torch.arange(count, device=device) * stride + number % stride


def ordered(attention: Tensor, order: Tensor | None) -> Tensor:
    """Attention [b, H, R, S] with the heads in a new order."""
    return attention if order is None else attention[:, order.to(attention.device)]
