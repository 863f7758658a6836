"""Doing one stage: each kind calls the function behind the command of the same name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.console import Progress
from rehead.errors import UnsupportedError, UsageError
from rehead.recipes.evaluation.output import FILE as EVALUATION
from rehead.recipes.pipeline import graph, named_models
from rehead.recipes.pipeline.graph import Place, Stage
from rehead.recipes.pipeline.labels import renamed
from rehead.recipes.pipeline.launch import launch
from rehead.recipes.pipeline.record import name_of


@dataclass(frozen=True)
class Site:
    """Where stages run.

    Attributes:
        out: the recipe's folder.
        command: recorded in what stages write.
        shown: what evaluations call models and texts, by path.
        quiet: whether launched processes should say nothing.
        progress: told how far a stage is.
        watch: gives a context manager for an uptraining, whose value is its progress callback and event listener.
    """

    out: Path
    command: str
    shown: dict[str, str] = field(default_factory=dict)
    quiet: bool = True
    progress: Progress | None = None
    watch: Callable[[], AbstractContextManager[tuple[Any, Any]]] = lambda: nullcontext((None, None))

    def place(self, place: Place) -> str:
        """A model as commands take it: a stage's folder, or ``id@revision``."""
        if place.stage is not None:
            return str(self.out / place.stage)
        name, revision = name_of(place)
        return f"{name}@{revision}" if revision else name


def run_stage(stage: Stage, site: Site) -> None:
    """Do a stage; its folder is complete when this returns, and resumable when it does not.

    Raises:
        ReheadError: as the stage's own command.
    """
    _RUNNERS[stage.kind](stage, site)


def _fetch(stage: Stage, site: Site) -> None:
    if not (site.out / stage.name / "model.safetensors").is_file():
        named_models.write_smollm2(site.out / stage.name)


def _new(stage: Stage, site: Site) -> None:
    from rehead.data.sources import read_documents
    from rehead.recipes.scratch import NewModel, new_model

    folder = site.out / stage.name
    if not folder.is_dir():
        new_model(folder, read_documents(stage.data["data"], option="new: data"), NewModel(**stage.options))


def _convert(stage: Stage, site: Site) -> None:
    from rehead.checkpoints.staging import staging_path
    from rehead.convert import convert

    place = stage.models["model"]
    model, revision = (str(site.out / place.stage), None) if place.stage else name_of(place)
    folder = site.out / stage.name

    def go(resume: bool) -> None:
        convert(
            model, folder, revision=revision, calibration=stage.data["calibration"], resume=resume,
            overwrite=folder.exists(), progress=site.progress, command=site.command, **stage.options,
        )  # fmt: skip

    try:
        go(resume=True)
    except UsageError:
        if not staging_path(folder).exists():
            raise
        go(resume=False)  # what lay there was left by another version; there is nothing to resume from


def _train(stage: Stage, site: Site) -> None:
    from rehead.recipes.training.checkpoints import work_path

    out = site.out / stage.name
    arguments = {
        "student": site.place(stage.models["student"]),
        "out": str(out),
        "teacher": site.place(stage.models["teacher"]) if "teacher" in stage.models else None,
        **stage.data,
        **{key: value for key, value in stage.options.items() if key != "launch"},
        "resume": "auto",
        "command": site.command,
    }
    launching = stage.options.get("launch")
    go: Callable[..., None] = _in_this_process if launching is None else _launched
    try:
        # A run that was killed after its last step has written its folder; what else lies there is to be replaced.
        try:
            go({**arguments, "overwrite": False}, launching, site)
        except UsageError:
            if not out.exists():
                raise
            go({**arguments, "overwrite": True}, launching, site)
    except UsageError as error:
        # The command's remedy is a flag that a recipe does not have.
        raise UsageError(str(error).replace("--resume never", f"removing {work_path(out)}")) from None


def _in_this_process(arguments: dict[str, Any], launching: None, site: Site) -> None:
    from rehead.recipes.training import uptrain

    with site.watch() as (progress, on_event):
        told = None if on_event is None else lambda event: on_event(renamed(event, site.shown))
        uptrain(**arguments, progress=progress, on_event=told)


def _launched(arguments: dict[str, Any], launching: dict[str, Any], site: Site) -> None:
    launch(arguments, launching["processes"], launching["config"], site.quiet)


def _evaluate(stage: Stage, site: Site) -> None:
    from rehead.recipes.evaluation import evaluate

    found = evaluate(
        site.place(stage.models["model"]),
        baseline=site.place(stage.models["baseline"]) if "baseline" in stage.models else None,
        control=site.place(stage.models["control"]) if "control" in stage.models else None,
        data=stage.data["data"],
        progress=site.progress,
        **stage.options,
    )
    table = renamed(found.as_json(), site.shown)
    write_file(site.out / stage.name / EVALUATION, json.dumps(table, indent=1, allow_nan=False) + "\n")


_RUNNERS: dict[str, Callable[[Stage, Site], None]] = {
    graph.FETCH: _fetch,
    graph.NEW: _new,
    graph.CONVERT: _convert,
    graph.UPTRAIN: _train,
    graph.CONTROL: _train,
    graph.EVALUATE: _evaluate,
}


def require(gpus: int, where: str) -> None:
    """Refuse a machine with fewer GPUs than a recipe wants.

    Raises:
        UnsupportedError: there are fewer.
    """
    if gpus:
        import torch

        there = torch.cuda.device_count()
        if there < gpus:
            raise UnsupportedError(
                f"{where}: wants {gpus} GPU{'s' if gpus > 1 else ''} and this machine has {there or 'none'}; run it "
                "where there are enough, or try it smaller with --set requires.gpus=0 --set launch=null"
            )


def free_memory() -> None:
    """Give a stage's memory back before the next one starts."""
    import gc

    torch = sys.modules.get("torch")
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
