"""How long a curve would take and how much memory it needs, tried out on a model's first layers with random weights.

The same survey runs on a model of the real width with one layer and with three, on as many tokens; what every
other layer adds is taken from the difference.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from rehead.checkpoints.source import Source
from rehead.console import duration
from rehead.convert.budget.curve import MEASURED
from rehead.convert.budget.options import CurveOptions
from rehead.convert.budget.survey import survey
from rehead.models.live import clock, resolve_device
from rehead.models.model import open_model
from rehead.options import takes
from rehead.recipes.estimate import Cost, Estimate, Sketch, memory_of, resident

#: Choices that are measured for a curve, and about as many for one budget.
_OF_CURVE, _OF_BUDGET = 2 * len(MEASURED), 40


@takes(CurveOptions)
def estimate_curve(
    model: str | os.PathLike[str], *, device: str = "auto", revision: str | None = None, **options: Any
) -> Estimate:
    """Estimate :func:`rehead.convert.budget.curve.curve` with the same arguments; texts are read, weights are not.

    Raises:
        UsageError: as ``curve``.
        UnsupportedError: a model that cannot be built with fewer layers, or has no option with a smaller cache.
    """
    asked = CurveOptions.parse(options)
    where = resolve_device(device)
    surveys: dict[int, float] = {}
    measurements: dict[int, float] = {}
    memory: dict[int, float] = {}
    with open_model(model, revision).source as source:
        sketch, base = Sketch.of(str(model), source), resident(where)
        for layers in dict.fromkeys((1, min(3, sketch.layers))):
            with tempfile.TemporaryDirectory() as folder:
                _write(sketch, source, layers, Path(folder))
                seconds: list[float] = []
                if not surveys:
                    _tried(folder, asked, where)  # what is compiled and imported once is no layer's
                memory[layers] = memory_of(lambda: seconds.extend(_tried(folder, asked, where)), where)  # noqa: B023
                surveys[layers], measurements[layers] = seconds
    survey_seconds, once = Cost.fitted(surveys).of(sketch.layers), Cost.fitted(measurements).of(sketch.layers)
    result = Estimate(
        {
            "loading": sketch.load_seconds(),
            "survey": survey_seconds,
            "measuring": _OF_CURVE * once if asked.measure else 0.0,
        },
        base + Cost.fitted(memory).of(sketch.layers),
    )
    result.facts["on"] = f"{where}, {sketch.layers} layers in float32"
    budget = duration(sketch.load_seconds() + survey_seconds + _OF_BUDGET * once)
    result.facts["convert --kv-cache"] = f"about {budget} to choose, then the conversion"
    result.notes.append("predicting, which takes seconds")
    return result


def _write(sketch: Sketch, source: Source, layers: int, folder: Path) -> None:
    """A model of the first layers, with random weights and the source's tokenizer."""
    for name in source.small_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with source.open_small(name) as read, open(folder / name, "wb") as write:
            shutil.copyfileobj(read, write)
    sketch.first_layers(layers, torch.float32, torch.device("cpu")).save_pretrained(folder)


def _tried(folder: str, asked: CurveOptions, device: torch.device) -> tuple[float, float]:
    """Seconds of the survey, and of one measurement."""
    start, opened = clock(device), open_model(folder)
    with opened.source, survey(opened, asked, device) as prepared:
        surveyed, options = clock(device), prepared.options
        prepared.meter.measure(prepared.predictor.forward(max(options.whole // 3, options.least)))
        return surveyed - start, clock(device) - surveyed
