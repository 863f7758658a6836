"""Several numbers of KV heads from one model, which is run over the calibration text once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehead.console import Progress
from rehead.convert.calibrated import calibrate_many
from rehead.convert.execute import Conversion, execute
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import Plan, make_plan
from rehead.errors import UsageError
from rehead.healing.finished import FinishedLayers
from rehead.models.live import resolve_device
from rehead.models.model import open_model
from rehead.options import takes


@takes(ConvertOptions)
def convert_many(
    model: str | os.PathLike[str],
    outs: Mapping[int, str | os.PathLike[str]],
    *,
    device: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[int, Conversion]:
    """Convert a checkpoint to several numbers of KV heads, with one pass over the calibration text for all of them.

    Closed forms only, solved on what the original itself sees. (A single :func:`~rehead.convert.convert` solves each
    layer on what those converted before it give; refit and fit follow that drift, so they take a run of their own.)

    Args:
        model: a local folder or a Hub id.
        outs: number of KV heads -> the folder to write.
        device: where calibration runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        revision: Hub revision of ``model``.
        overwrite: replace existing checkpoints.
        progress: called with (stage, done, total).

    Returns:
        What was done, for each number.

    Raises:
        UsageError: an invalid argument, or refit or fit.
        UnsupportedError: as :func:`~rehead.convert.convert`.
    """
    if not outs:
        raise UsageError("no number of KV heads to convert to; give at least one with its folder")
    for name in ("refit", "fit"):
        if options.get(name):
            raise UsageError(f"--{name}: follows each result's own drift and cannot share a pass; convert one by one")
    places: dict[str, int] = {}
    for kv, out in outs.items():
        other = places.setdefault(os.path.realpath(out), kv)
        if other != kv:
            raise UsageError(f"{os.fspath(out)}: is to hold {other} KV heads and {kv}; give each a folder of its own")
    opened = open_model(model, revision)
    with opened.source:
        plans = {kv: make_plan(opened, ConvertOptions.parse({**options, "num_key_value_heads": kv})) for kv in outs}
        parent = Path(next(iter(outs.values()))).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehead-", dir=parent) as folder:
            solved = _solved([plan for plan in plans.values() if plan.calibrated], Path(folder), device, progress)
            command = f"rehead.convert.convert_many(..., {sorted(outs)})"
            return {
                kv: execute(plan, outs[kv], device, False, overwrite, progress, command, None, solved.get(kv))
                for kv, plan in plans.items()
            }


def _solved(
    plans: list[Plan], folder: Path, device: str, progress: Progress | None
) -> dict[int, tuple[FinishedLayers, dict[str, Any]]]:
    """The layers of calibrated plans by their number of KV heads, in a folder each."""
    if not plans:
        return {}
    layers = {plan.kv: FinishedLayers(folder / str(plan.kv)) for plan in plans}
    for finished in layers.values():
        finished.folder.mkdir()
    facts = calibrate_many(plans, list(layers.values()), resolve_device(device), progress)
    return {kv: (finished, facts) for kv, finished in layers.items()}
