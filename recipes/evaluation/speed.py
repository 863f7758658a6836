"""Prefill and decoding speed, as plain transformers gives it.

Both use the dynamic cache that ``generate`` uses by default, plain eager forward passes and no compilation: this is the
speed of the checkpoint in transformers, not the ceiling of its architecture, and serving engines will be faster. What
carries over is the ratio between models with and without shared KV heads, as far as the cache decides it. Models take
turns within each repeat, in an order that alternates, so that a machine that slows down does so for all.

Every figure is a median over repeats with its 95% interval by order statistics, which assumes no distribution: the
lowest and highest of the repeats, less k at each end, where k or fewer of as many fair coins show heads with a
probability of at most 2.5%. Fewer than six repeats cannot give 95%; their interval is from the lowest to the highest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.models.live import clock, evaluating
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.positions import position_limit
from rehead.models.predictions import keeps_logits, vocabulary
from rehead.recipes import evaluation_schema as schema

#: Decoding steps that are timed after each prefill, behind one that is not.
STEPS = 8


class NoCache(Exception):
    """A model that gives back no key-value cache to decode with."""


def speed_rows(
    models: Mapping[schema.Who, Any],
    kv_bytes_per_token: Mapping[schema.Who, float | None],
    batches: Sequence[int],
    contexts: Sequence[int],
    repeats: int = 6,
    seed: int = 0,
    *,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[schema.Speed], list[str]]:
    """Time every model at every size.

    Args:
        models: transformers causal language models on one device.
        kv_bytes_per_token: of each, to leave out what does not fit into a CPU's memory.
        batches, contexts: sizes; every batch is tried at every context.
        repeats: prefills of which the median is taken, each followed by :data:`STEPS` timed decoding steps, whose
            median is one repeat; one more goes before them to warm up.
        seed: of the tokens, which are random.
        progress: called with (sizes done, sizes).

    Returns:
        (rows, notes on sizes that were left out and why).
    """
    rows: list[schema.Speed] = []
    notes: list[str] = []
    done = 0
    for context in contexts:
        for batch in batches:
            reason = _too_large(models, kv_bytes_per_token, batch, context)
            if reason is None:
                try:
                    rows += _measure(models, batch, context, repeats, seed)
                except torch.OutOfMemoryError:
                    reason = "out of memory"
                except NoCache as error:
                    return [], [*notes, f"speed left out: {error}"]
            if reason is not None:
                torch.cuda.empty_cache()  # past the handler, in which the error holds what had been allocated
                notes.append(f"speed at batch {batch}, context {context} left out: {reason}")
            done += 1
            if progress is not None:
                progress(done, len(contexts) * len(batches))
    return rows, notes


def _measure(models: Mapping[schema.Who, Any], batch: int, context: int, repeats: int, seed: int) -> list[schema.Speed]:
    generator = torch.Generator().manual_seed(seed)
    prefills: dict[schema.Who, list[float]] = {who: [] for who in models}
    steps: dict[schema.Who, list[float]] = {who: [] for who in models}
    peaks: dict[schema.Who, int | None] = dict.fromkeys(models)
    for repeat in range(repeats + 1):
        for who, model in list(models.items())[:: -1 if repeat % 2 else 1]:
            tokens = torch.randint(0, vocabulary(model), (batch, context), generator=generator)
            prefill, decode, peak = _once(model, tokens)
            if repeat:
                prefills[who].append(prefill)
                steps[who].append(statistics.median(decode))
            peaks[who] = peak
    rows = []
    for who in models:
        size: dict[str, Any] = {"batch": batch, "context": context, "peak_memory_bytes": peaks[who]}
        rows += [
            _row(batch * context, prefills, who, phase="prefill", **size),
            _row(batch, steps, who, phase="decode", **size),
        ]
    return rows


def _row(tokens: int, seconds: Mapping[schema.Who, list[float]], who: schema.Who, **size: Any) -> schema.Speed:
    """One figure with its intervals: of a pass or step over ``tokens``, from the seconds of every repeat."""
    own = median_interval([tokens / second for second in seconds[who]])
    ratio = None
    if who != "baseline" and "baseline" in seconds:
        ratio = median_interval([base / mine for base, mine in zip(seconds["baseline"], seconds[who])])
    return schema.Speed(
        who=who, tokens_per_second=own.value, low=own.low, high=own.high, ratio=ratio,
        seconds=statistics.median(seconds[who]), repeats=len(seconds[who]), **size,
    )  # fmt: skip


def median_interval(values: Sequence[float]) -> schema.Interval:
    """The median with its 95% interval by order statistics (see the module's text); none of a single value."""
    ranked, count = sorted(values), len(values)
    if count < 2:
        return schema.Interval(value=ranked[0])
    skipped, tail = 0, 0.5**count  # the chance that no value lies below the true median
    while skipped < count:
        tail += math.comb(count, skipped + 1) * 0.5**count
        if tail > 0.025:
            break
        skipped += 1
    return schema.Interval(value=statistics.median(ranked), low=ranked[skipped], high=ranked[count - 1 - skipped])


def _once(model: Any, tokens: Tensor) -> tuple[float, list[float], int | None]:
    """(seconds of one prefill, seconds of each decoding step after it, bytes taken beyond what was allocated)."""
    device = next(model.parameters()).device
    keep = {"logits_to_keep": 1} if keeps_logits(model) else {}
    tokens = tokens.to(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    steps = []
    with evaluating(model):
        start = clock(device)
        result = model(input_ids=tokens, use_cache=True, **keep)
        prefill = clock(device) - start
        if returned_cache(result) is None:
            raise NoCache(f"{model.config.model_type} gives back no KV cache to decode with")
        for step in range(STEPS + 1):
            cache, latest = returned_cache(result), result.logits[:, -1:].argmax(-1)
            start = clock(device)
            result = model(input_ids=latest, use_cache=True, **cache_argument(cache))
            if step:
                steps.append(clock(device) - start)
    return prefill, steps, torch.cuda.max_memory_allocated(device) - before if on_gpu else None


def _too_large(
    models: Mapping[schema.Who, Any], sizes: Mapping[schema.Who, float | None], batch: int, context: int
) -> str | None:
    """Why a size cannot be tried, or None."""
    free = _available_memory()
    for who, model in models.items():
        limit = position_limit(model)
        if limit is not None and context + STEPS + 1 > limit:
            return f"the {who} has positions for {limit}"
        # A CPU has no error to catch: the system would kill the process, or swap until nobody waits any more.
        if free is not None and next(model.parameters()).device.type == "cpu":
            need = 2 * batch * (context + STEPS) * (sizes.get(who) or 0.0)
            if need > free:
                return f"the {who}'s cache would need {need / 1e9:.1f} GB with room to grow, {free / 1e9:.1f} are free"
    return None


def _available_memory() -> float | None:
    """Bytes that the system can give without swapping; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return None
