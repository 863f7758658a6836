"""Recover a whole model on calibration text: original and changed model side by side, one layer of each at a time.

Both run over the same text. When a layer is changed, the changed layers before it have already run, so it is fitted to
the inputs that it will really get; its target is the original's output on the original's inputs. Closed forms alone can
also be solved on the original's own inputs: then one pass over the text serves any number of them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.console import Progress
from rehead.data.calibration import CalibrationText
from rehead.healing.finished import FinishedLayers
from rehead.healing.job import Job
from rehead.healing.layer import LayerRecovery
from rehead.healing.layerwise import LayerwiseModel
from rehead.healing.moments import Moments
from rehead.healing.rotation import rotation_of
from rehead.healing.runner import Runner, TextState
from rehead.healing.sight import gather_moments
from rehead.healing.writers import run_original
from rehead.models.device_memory import free_memory, in_host_memory
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.ranks import Ranks

#: Tokens in one forward pass of a layer.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
#: Python 3.12 and later set their few immortal objects aside themselves; whoever does so means hundred thousands.
_IMMORTAL = 10_000
#: Copies of the text's hidden states that one layer's recovery holds: the two models' before it, the inputs of its
#: attention, its target and the drift.
_COPIES = 5


@torch.no_grad()
def recover(
    job: Job,
    text: CalibrationText,
    finished: FinishedLayers,
    device: torch.device,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Change every layer of a job over calibration text.

    Several processes share the sequences of each length: each runs both models over its own, and sums over the text are
    all that they exchange. From these each computes the same layers, of which the main one's are what all go on with.

    Args:
        job: the models and how their layers change.
        text: the calibration text, whole in every process.
        finished: saves the changed layers; those already in it are not computed again. Only the main process's is used.
        device: the device that layers run on.
        progress: called with (stage, layers done, layers).
        ranks: the processes; None: this one alone.

    Returns:
        Facts for the manifest.

    Raises:
        UnsupportedError: the model cannot be run layer by layer, or a weight is not finite.
    """
    ranks = ranks or Ranks(0, 1, device)
    original, before = _start(job.original, text, device, ranks)
    model = LayerwiseModel(job.changed, job.config, device, job.modules)
    changed = Runner(model, original.batch_tokens, ranks, _counts(text))
    if job.own_calls:
        model.embed([part[: changed.batch_rows(part)] for part in text.tokens], changed.batch_tokens)
    else:
        model.calls = original.model.calls
    recovery, prefix = LayerRecovery(job, original, changed), before.clone()
    for layer in _layers(job.original, progress):
        original.model.load_layer(layer)
        if layer not in job.layers:
            original.run(layer, prefix)
            original.run(layer, before)
            original.model.unload_layer(layer)
            continue
        tensors = ranks.same(finished.load(layer) if ranks.main else None)
        if tensors is None:
            tensors, facts = recovery.change(layer, before, prefix)
            tensors = ranks.same(tensors) or {}
            if ranks.main:
                finished.save(layer, tensors, facts)
        else:
            original.run(layer, before)
        original.model.unload_layer(layer)
        model.load_layer(layer, tensors)
        changed.run(layer, prefix)
        model.unload_layer(layer)
    shared = {"processes": ranks.world} if ranks.world > 1 else {}
    return {**_text_facts(text, device), **shared, "drift": round(_distance(prefix, before, ranks), 6)}


@torch.no_grad()
def solve(
    jobs: Sequence[Job],
    text: CalibrationText,
    finished: Sequence[FinishedLayers],
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Solve the closed forms of several jobs for one original in one pass over the text.

    Moments are gathered once for each layer, for groups as fine as any job needs, on the original's own inputs. Unlike
    in :func:`recover`, a layer does not take the errors of the changed layers before it into account.

    Args:
        jobs: jobs without refit and fit, since those depend on each job's own errors.
        text: the calibration text.
        finished: saves each job's layers.
        device: the device that layers run on.
        progress: called with (stage, layers done, layers).

    Returns:
        Facts for the manifests.

    Raises:
        ValueError: a job has more than closed forms.
    """
    every = [layer_job for job in jobs for layer_job in job.layers.values()]
    if any(part.refit or part.fit or part.writers or part.closed_form is None for part in every):
        raise ValueError("only closed forms can share one pass")
    needs = tuple(dict.fromkeys(name for part in every for name in part.needs))
    groups = math.lcm(*(part.groups for part in every))
    for seen in observe(jobs[0].original, text, needs, groups, device, progress):
        layer = seen.layer
        for job, folder in zip(jobs, finished):
            form = job.layers[layer].closed_form if layer in job.layers else None
            if form is None:
                continue
            changed = form(seen.heads, seen.moments)
            weights = changed.weights
            tensors = job.tensors(layer, weights) if isinstance(weights, Heads) else weights
            folder.save(layer, {name: job.store(name, tensor) for name, tensor in tensors.items()}, changed.facts)
    return _text_facts(text, device)


@dataclass(frozen=True)
class Observed:
    """What text shows of one attention layer.

    Attributes:
        layer: its index. heads: its weights, float32. moments: what was asked for.
        inputs: what its attention reads, [N, S, n], one for each length.
        outputs: what its attention adds, [N, S, m] for each length; empty where not asked for.
    """

    layer: int
    heads: Heads
    moments: Moments
    inputs: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def observe(
    model: Model,
    text: CalibrationText,
    needs: Sequence[str],
    groups: int,
    device: torch.device,
    progress: Progress | None = None,
    outputs: Collection[int] = (),
) -> Iterator[Observed]:
    """Run a model over text once and yield what it shows of each of its attention layers.

    Args:
        model: the model to run.
        text: the calibration text.
        needs: names of moments (:data:`~rehead.healing.moments.MOMENTS`).
        groups: number of groups of neighbouring query heads; :meth:`~rehead.healing.moments.Moments.merged` gives
            coarser groups.
        device: the device that layers run on.
        progress: called with (stage, layers done, layers).
        outputs: layers whose outputs are wanted.

    Yields:
        One layer at a time, on the device.
    """
    runner, state = _start(model, text, device)
    for layer in _layers(model, progress):
        runner.model.load_layer(layer)
        kept: list[Tensor] = []
        if layer in model.layers:
            heads = model.heads(layer).to(device, torch.float32)
            inputs = runner.attention_inputs(layer, state)
            rotation = rotation_of(runner, layer, heads, max(text.lengths))
            moments = gather_moments(runner, layer, heads, state, inputs, needs, groups, rotation)
            kept = run_original(runner, layer, state, state).clean if layer in outputs else []
            yield Observed(layer, heads, moments, inputs, kept)
        if not kept:
            runner.run(layer, state)
        runner.model.unload_layer(layer)


def _start(
    model: Model, text: CalibrationText, device: torch.device, ranks: Ranks | None = None
) -> tuple[Runner, TextState]:
    """(a model to run layer by layer, this process's share of the text before its first layer)."""
    ranks = ranks or Ranks(0, 1, device)
    batch_tokens = _BATCH_TOKENS.get(device.type, 4096)
    runner = Runner(LayerwiseModel(model, model.config, device), batch_tokens, ranks, _counts(text))
    hidden = runner.model.embed(text.tokens, batch_tokens, ranks.rank, ranks.world)
    # Kept where the layers run, if all copies fit there with as much again for the layers.
    if device.type == "cuda" and 2 * _COPIES * sum(part.nbytes for part in hidden) > free_memory(device):
        hidden = [in_host_memory(part) for part in hidden]
    return runner, TextState(hidden)


def _layers(model: Model, progress: Progress | None) -> Iterator[int]:
    """Every layer's index, with calls to ``progress``; what a layer leaves in circles of references is freed.

    Such circles can hold a layer's hidden states. Python looks for them by the number of objects, of which there are
    few, not by their size: fits have held 30 layers' text on a GPU. What lives already is set aside meanwhile, which
    makes a search a thousand times faster.
    """
    total = model.config.num_hidden_layers
    gc.collect()
    sets_aside = gc.get_freeze_count() < _IMMORTAL
    if sets_aside:
        gc.freeze()
    try:
        for layer in range(total):
            if progress is not None:
                progress("calibrating", layer, total)
            yield layer
            gc.collect()
    finally:
        if sets_aside:
            gc.unfreeze()
    if progress is not None:
        progress("calibrating", total, total)


def _counts(text: CalibrationText) -> dict[int, int]:
    """Sequences of each length."""
    return {part.shape[1]: len(part) for part in text.tokens}


def _text_facts(text: CalibrationText, device: torch.device) -> dict[str, Any]:
    lengths = text.lengths
    return {
        "text": text.names,
        "tokens": text.count,
        "length": lengths[0] if len(lengths) == 1 else lengths,
        "device": str(device),
    }


def _distance(state: TextState, other: TextState, ranks: Ranks) -> float:
    """Relative distance of hidden states from others, over all processes."""

    def size(parts: Iterator[Tensor]) -> float:
        return sum(float(part.square().sum()) for part in parts)

    gap = size(a - b for a, b in zip(state.hidden, other.hidden))
    sizes = ranks.sum(torch.tensor([gap, size(iter(other.hidden))], dtype=torch.float64))
    gap, whole = sizes.tolist()
    return (gap / max(whole, 1e-24)) ** 0.5
