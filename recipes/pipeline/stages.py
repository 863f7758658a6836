"""Doing one stage: each kind calls the function behind the command of the same name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.console import Progress
from rehead.errors import EXIT_INTERRUPTED, QualityError, ReheadError, UnsupportedError, UsageError, VerificationError
from rehead.recipes.evaluation.output import FILE as EVALUATION
from rehead.recipes.pipeline import graph, named_models
from rehead.recipes.pipeline.graph import Place, Stage
from rehead.recipes.pipeline.labels import renamed
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
    launch = stage.options.get("launch")
    go: Callable[..., None] = _in_this_process if launch is None else _launched
    try:
        # A run that was killed after its last step has written its folder; what else lies there is to be replaced.
        try:
            go({**arguments, "overwrite": False}, launch, site)
        except UsageError:
            if not out.exists():
                raise
            go({**arguments, "overwrite": True}, launch, site)
    except UsageError as error:
        # The command's remedy is a flag that a recipe does not have.
        raise UsageError(str(error).replace("--resume never", f"removing {work_path(out)}")) from None


def _in_this_process(arguments: dict[str, Any], launch: None, site: Site) -> None:
    from rehead.recipes.training import uptrain

    with site.watch() as (progress, on_event):
        told = None if on_event is None else lambda event: on_event(renamed(event, site.shown))
        uptrain(**arguments, progress=progress, on_event=told)


def _launched(arguments: dict[str, Any], launch: dict[str, Any], site: Site) -> None:
    """In several processes: ``accelerate launch`` of a small module that reads its arguments from a file."""
    config = accelerate_config(launch["config"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arguments.json"
        table = {**arguments, "processes": launch["processes"], "launched_by": os.getpid()}
        path.write_text(json.dumps(table), encoding="utf-8")
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
            "--num_processes", str(launch["processes"]), "-m", "rehead.recipes.pipeline.launched", str(path),
            *(["--quiet"] if site.quiet else []),
        ]  # fmt: skip
        # Its words go to a file: a pipe that nobody empties would stop it.
        with open(Path(folder) / "words", "w+", encoding="utf-8", errors="replace") as words:
            done = subprocess.run(command, stderr=words if site.quiet else None)
            words.seek(0)
            last = (words.read().strip().splitlines() or ["see its output"])[-1]
        error = Path(folder) / "error.json"
        if error.is_file():
            found = json.loads(error.read_text(encoding="utf-8"))
            raise error_of(found["error"], found["exit_code"])
        if done.returncode:
            raise UnsupportedError(
                f"accelerate launch of {launch['processes']} processes: ended with code {done.returncode} ({last}); "
                "run the recipe again to resume from the last checkpoint"
            )


def error_of(message: str, exit_code: int) -> ReheadError:
    """An error of the class that an exit code stands for."""
    if exit_code >= 128:
        from rehead.recipes.training.loop import Interrupted

        return Interrupted(message, 2 if exit_code == EXIT_INTERRUPTED else exit_code - 128)
    kinds = {kind.exit_code: kind for kind in (UsageError, VerificationError, QualityError)}
    return kinds.get(exit_code, UnsupportedError)(message)


def accelerate_config(name: str) -> Path:
    """The accelerate config file for ``launch.config``: a shipped one by name, or a file.

    Raises:
        UsageError: there is no such file.
    """
    shipped = Path(str(files("rehead.recipes.library") / "accelerate" / f"{name}.yaml"))
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = sorted(entry.stem for entry in shipped.parent.glob("*.yaml"))
        raise UsageError(f"launch.config {name}: no such file; give an accelerate config file or {' or '.join(known)}")
    return path


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
