"""What an evaluation would measure, and about how long and how much memory it would take; reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.source import Source
from rehead.errors import UsageError
from rehead.models.distance import distances, token_nll
from rehead.models.live import evaluating, resolve_device
from rehead.models.predictions import batch_size, keeps_logits, vocabulary
from rehead.options import takes
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.estimate import Estimate, Sketch, memory_of, resident, timed
from rehead.recipes.evaluation.models import open_named, stored_dtype
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.evaluation.run import requested
from rehead.recipes.evaluation.samples import PROMPT, continue_greedily
from rehead.recipes.evaluation.speed import STEPS
from rehead.recipes.evaluation.texts import TokenisedText, read_texts
from rehead.recipes.evaluation.windows import cut, predict_last


@dataclass(frozen=True)
class Paces:
    """Seconds of one model's work on this machine.

    Attributes:
        body: of one token through the layers.
        nll: of one token's loss, beyond that.
        step: of one decoding step.
    """

    body: float
    nll: float
    step: float


@takes(EvaluateOptions)
def estimate_evaluation(
    model: str,
    *,
    revision: str | None = None,
    baseline: str | None = None,
    control: str | None = None,
    data: Sequence[str] = (),
    **options: Any,
) -> Estimate:
    """Estimate :func:`rehead.recipes.evaluate` with the same arguments; texts are read, weights are not.

    Raises:
        UsageError: as ``evaluate``, as far as it shows before a model is loaded.
        UnsupportedError: a model that cannot be built with fewer layers.
    """
    chosen = EvaluateOptions.parse(options)
    model, baseline, data = requested(chosen, model, revision, baseline, data)
    device = resolve_device(chosen.device)
    texts = read_texts(data, baseline or model, chosen)
    names: dict[schema.Who, str | None] = {"baseline": baseline, "control": control, "model": model}
    opened = {who: (name, open_named(name)) for who, name in names.items() if name is not None}
    sketches = {who: Sketch.of(name, source) for who, (name, source) in opened.items()}
    base = resident(device)
    dtypes = {who: loaded_dtype(chosen.dtype, device, source) for who, (_, source) in opened.items()}
    paces, pair, working = _tried(sketches, chosen, dtypes, device)
    result = Estimate(_seconds(sketches, paces, pair, texts, chosen), 0.0)
    weights = [sketch.parameters * dtypes[who].itemsize for who, sketch in sketches.items()]
    # While the last model is loaded its file is in memory too.
    loading = max(sketch.stored_bytes for sketch in sketches.values()) if device.type == "cpu" else 0
    result.memory_bytes = base + sum(weights) + max(working, loading)
    result.facts["models"] = ", ".join(f"{who} {sketch.name}" for who, sketch in sketches.items())
    result.facts["texts"] = ", ".join(f"{text.name} ({len(text.tokens):,} tokens)" for text in texts) or "none"
    result.facts["on"] = ", ".join(map(str, (device, *dict.fromkeys(dtypes.values())))).replace("torch.", "")
    if chosen.tasks:
        result.notes.append(f"the tasks {', '.join(chosen.tasks)}")
    if chosen.patches:
        result.notes.append("what the patches change in speed and memory")
    return result


def loaded_dtype(name: str, device: torch.device, source: Source) -> torch.dtype:
    """The dtype in which a checkpoint is loaded; ``auto`` is float32 on a CPU and its own elsewhere."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    stored = stored_dtype(source)
    # Quantised weights are unpacked as they are used.
    own = stored if stored.is_floating_point and stored.itemsize > 1 else torch.bfloat16
    return torch.float32 if device.type == "cpu" else own


def _tried(
    sketches: dict[schema.Who, Sketch],
    chosen: EvaluateOptions,
    dtypes: dict[schema.Who, torch.dtype],
    device: torch.device,
) -> tuple[dict[schema.Who, Paces], float, float]:
    """(paces of each model, seconds to compare two models on one token, bytes that a batch takes)."""
    live = {who: sketch.first_layers(sketch.tried, dtypes[who], device) for who, sketch in sketches.items()}
    size = min(batch_size(model, chosen.window, chosen.batch_tokens) for model in live.values())
    known = min(vocabulary(model) for model in live.values())
    draw = torch.Generator().manual_seed(chosen.seed)
    rows = torch.randint(0, known, (size, chosen.window), generator=draw)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    with evaluating(*live.values()):
        paces = {who: _paces(sketches[who], model, rows, device) for who, model in live.items()}
        if "baseline" not in live:
            return paces, 0.0, memory_of(lambda: predict_last(live["model"], inputs, inputs.shape[1]), device)

        def compare() -> None:
            ours, theirs = (predict_last(live[who], inputs, inputs.shape[1]) for who in ("model", "baseline"))
            distances(theirs, ours, targets)

        working = memory_of(compare, device)
        pair = timed(compare, device, 1) / targets.numel()
    layers = sum(paces[who].body * sketches[who].tried / sketches[who].layers for who in ("baseline", "model"))
    return paces, max(pair - layers, 0.0), working


def _paces(sketch: Sketch, live: Any, rows: Tensor, device: torch.device) -> Paces:
    """The paces of the whole model, from its first layers on one batch."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    keep = {"logits_to_keep": 1} if keeps_logits(live) else {}
    here, tokens, prompts = inputs.to(device), inputs.numel(), rows[:3, :PROMPT]
    body = timed(lambda: live(input_ids=here, use_cache=False, **keep), device) / tokens
    whole = timed(lambda: token_nll(predict_last(live, inputs, inputs.shape[1]), targets), device, 1) / tokens
    short, long = (timed(partial(continue_greedily, live, prompts, count), device, 1) for count in (1, 5))
    # A step reads every weight once, so it takes as many times longer as there are more of them.
    grown = sketch.parameters / max(sum(each.numel() for each in live.parameters()), 1)
    return Paces(body / sketch.tried * sketch.layers, max(whole - body, 0.0), max(long - short, 0.0) / 4 * grown)


def _seconds(
    sketches: dict[schema.Who, Sketch],
    paces: dict[schema.Who, Paces],
    pair: float,
    texts: Sequence[TokenisedText],
    chosen: EvaluateOptions,
) -> dict[str, float]:
    """By stage; each counts the tokens that it runs models over."""
    everyone = sum(pace.body for pace in paces.values())
    seconds = {"loading": sum(sketch.load_seconds() for sketch in sketches.values())}
    quality = 0.0
    compared = "baseline" in paces
    for text in texts:
        for convention in chosen.conventions:
            windows = cut(convention, len(text.tokens), chosen.window, chosen.stride)
            read, counted = sum(w.end - w.start - 1 for w in windows), sum(w.counted for w in windows)
            if not (compared and convention == "disjoint"):
                quality += read * everyone + counted * sum(pace.nll for pace in paces.values())
        if compared:
            read = len(text.tokens) // chosen.window * (chosen.window - 1)
            quality += read * (everyone + pair * (len(paces) - 1))
    if texts:
        seconds["perplexity and KL"] = quality
        if chosen.samples:
            steps = sum(pace.step for pace in paces.values())
            seconds["samples"] = chosen.samples * PROMPT * everyone + chosen.sample_tokens * steps
    if chosen.damage:
        read = max(chosen.damage_tokens, chosen.window)
        layers = sketches["model"].layers
        seconds["damage"] = read * (paces["baseline"].body * (layers + 1) + pair * layers)
    rows = [length * len(chosen.needle_depths) * chosen.needle_trials for length in chosen.needle]
    if rows:
        seconds["needle"] = sum(rows) * everyone
    if chosen.recall:
        seconds["recall"] = 2 * 2 * chosen.recall_trials * sum(chosen.recall) * everyone
    if chosen.speed:
        sizes = [(batch, context) for batch in chosen.speed_batch for context in chosen.speed_context]
        once = sum(
            batch * context * pace.body + (STEPS + 1) * pace.step for batch, context in sizes for pace in paces.values()
        )
        seconds["speed"] = (chosen.speed_repeats + 1) * once
    return seconds


def require_no_output(out: str | None, push_to_hub: str | None) -> None:
    """Raise UsageError where a dry run is asked to write something."""
    if out is not None or push_to_hub is not None:
        flag = "--out" if out is not None else "--push-to-hub"
        raise UsageError(f"--dry-run: measures nothing, so there is nothing for {flag}; leave one of them out")
