"""Running a recipe: every stage that its output does not already stand for, then the report."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.files import write_file
from rehead.errors import EXIT_INTERRUPTED, QualityError, ReheadError, UsageError
from rehead.recipes.pipeline.graph import TRAININGS, CellPlan, Stage, plan_cell
from rehead.recipes.pipeline.labels import shown_names
from rehead.recipes.pipeline.launch import accelerate_config, error_of
from rehead.recipes.pipeline.load import LoadedRecipe, load_recipe
from rehead.recipes.pipeline.record import FOLDER, drop, outside, state, write_record
from rehead.recipes.pipeline.schema import Recipe
from rehead.recipes.pipeline.stages import Site, free_memory, require, run_stage
from rehead.recipes.pipeline.sweep import cells

if TYPE_CHECKING:
    from rehead.recipes.report import ReportPaths

CELLS = "cells.json"
Say = Callable[[str, str, str], None]
"""Called with (event, stage's kind, text); events are ``run``, ``done``, ``skip``, ``wait`` and ``fail``."""


@dataclass(frozen=True)
class StageOutcome:
    """What became of one stage: ``done`` in so many seconds, or ``skipped`` since its output holds."""

    name: str
    kind: str
    title: str
    action: str
    reason: str
    seconds: float


@dataclass
class RecipeRun:
    """What :func:`run_recipe` did.

    Attributes:
        out: the recipe's folder.
        report: the report's paths and verdict; None where nothing was evaluated.
        stages: in the order in which they came.
        failures: (cell, error) of the cells of a sweep that failed.
    """

    out: Path
    report: ReportPaths | None = None
    stages: list[StageOutcome] = field(default_factory=list)
    failures: list[tuple[str, ReheadError]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "out": str(self.out),
            "report": self.report.as_json() if self.report else None,
            "stages": [vars(outcome) for outcome in self.stages],
            "failures": [{"cell": cell, "error": str(error)} for cell, error in self.failures],
        }


@dataclass(frozen=True)
class Planned:
    """A recipe that has been read and checked: where it writes, its cells, and what it was read from."""

    loaded: LoadedRecipe
    recipe: Recipe
    out: Path
    cells: list[CellPlan]

    @property
    def sweep(self) -> bool:
        """Whether there is one."""
        return bool(self.recipe.sweep)

    def shared(self) -> list[str]:
        """Stages that more than one cell needs."""
        names = [name for plan in self.cells for name in plan.stages]
        return sorted({name for name in names if names.count(name) > 1})

    def cell(self, index: int) -> CellPlan:
        """One cell.

        Raises:
            UsageError: there is none of that number.
        """
        if not 0 <= index < len(self.cells):
            raise UsageError(f"--cell {index}: there are cells 0 to {len(self.cells) - 1}; see --list-cells")
        return self.cells[index]


def plan_recipe(recipe: str, settings: Sequence[str] = (), out: str | os.PathLike[str] | None = None) -> Planned:
    """Read a recipe and work out its stages; no model and no text is opened.

    Args:
        recipe: a file, or the name of a shipped recipe.
        settings: ``"a.b=value"``.
        out: the folder to write to; the recipe's own when None.

    Raises:
        UsageError: something in it is invalid; the line names the key.
    """
    loaded = load_recipe(recipe, settings)
    base: Recipe = Recipe.parse({**loaded.raw}, loaded.origin)
    folder = Path(os.path.abspath(out or base.out or loaded.base / f"{base.name}-out"))
    return Planned(loaded, base, folder, [plan_cell(cell, loaded.origin) for cell in cells(loaded.raw, loaded.origin)])


def run_recipe(
    recipe: str,
    *,
    settings: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    cell: int | None = None,
    gather: bool = False,
    quiet: bool = True,
    say: Say | None = None,
    progress: Callable[[], Any] | None = None,
    watch: Callable[[], Any] | None = None,
) -> RecipeRun:
    """Run a recipe: convert -> uptrain -> evaluate -> report.

    A stage is skipped where its record says that it was asked for the same, made from the same, and its files still
    have their SHA-256. A killed run resumes where it was: conversion and uptraining from what they had finished.

    Args:
        recipe: a file, or the name of a shipped recipe.
        settings: ``"a.b=value"`` each, over what the recipe says.
        out: the folder to write to; the recipe's own when None.
        cell: run one cell of a sweep only; several processes or machines may run cells of one folder at once.
        gather: run nothing; make the report of the cells that have been run.
        quiet: whether launched processes should say nothing.
        say: told about every stage.
        progress: gives a context manager for each stage, whose value is called with (what, done, total).
        watch: the same for uptrainings, whose value is (progress, event listener).

    Raises:
        UsageError: an invalid recipe.
        UnsupportedError: the machine lacks what it wants, or a stage's input is unsupported.
        QualityError: a gate was not met; the report is written.
        ReheadError: as the stages.
    """
    from rehead.recipes.pipeline.gather import failed_gates
    from rehead.recipes.pipeline.gather import gather as write_gathered

    planned = plan_recipe(recipe, settings, out)
    if cell is not None and gather:
        raise UsageError("--cell and --gather: run a cell or gather all; give one of them")
    plans = planned.cells if cell is None else [planned.cell(cell)]
    result = RecipeRun(planned.out)
    if not gather:
        require(planned.recipe.requires.gpus, planned.recipe.name)
        for stage in (stage for plan in plans for stage in plan.stages.values() if stage.options.get("launch")):
            accelerate_config(stage.options["launch"]["config"])  # before other stages, which may take hours
        write_cells(planned, settings)
        runner = _Runner(planned, plans, settings, quiet, say or (lambda *_: None), progress, watch, result)
        for plan in plans:
            try:
                runner.cell(plan)
            except ReheadError as error:
                if len(plans) == 1 or error.exit_code >= EXIT_INTERRUPTED:
                    raise
                runner.say("fail", "cell", f"{plan.cell.label}: {error}")
                result.failures.append((plan.cell.label, error))
    if any(plan.evaluations for plan in plans):
        folder = planned.out if cell is None else planned.out / f"cell-{cell}"
        if not result.failures or any(_evaluated(plan, planned.out) for plan in plans):
            result.report = write_gathered(plans, planned.out, folder)
    if result.failures:
        label, first = result.failures[0]
        message = f"{len(result.failures)} of {len(plans)} cells failed, the first ({label}): {first}"
        raise error_of(message, first.exit_code)
    failed = failed_gates(plans, planned.out)
    if failed and result.report is not None:
        raise QualityError(f"{'; '.join(failed)}; the report is {result.report.html}")
    return result


def _evaluated(plan: CellPlan, out: Path) -> bool:
    return all((out / name).is_dir() for name, _, _ in plan.evaluations)


def write_cells(planned: Planned, settings: Sequence[str] = ()) -> Path:
    """Write ``cells.json``: what each cell is, and the command that runs it anywhere.

    Raises:
        ResourceError: the disk is full or fails.
    """
    path = planned.out / CELLS
    text = json.dumps(cells_table(planned, settings), indent=1, ensure_ascii=False) + "\n"
    # Cells that run at once would otherwise take turns in replacing a file by itself.
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text)
    return path


def cells_table(planned: Planned, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of cells, as JSON types."""
    base = ["rehead", "run", planned.loaded.origin, "--out", str(planned.out)]
    base += [word for setting in settings for word in ("--set", setting)]
    return {
        "recipe": planned.recipe.name,
        "cells": [
            {
                "index": plan.cell.index,
                "label": plan.cell.label,
                "overrides": plan.cell.overrides,
                "stages": list(plan.stages),
                "command": shlex.join([*base, "--cell", str(plan.cell.index)]),
            }
            for plan in planned.cells
        ],
        "shared": planned.shared(),
        "gather": shlex.join([*base, "--gather"]),
    }


class _Runner:
    """Runs cells, remembering what holds so that a stage that cells share is checked once."""

    def __init__(
        self,
        planned: Planned,
        plans: Sequence[CellPlan],
        settings: Sequence[str],
        quiet: bool,
        say: Say,
        progress: Callable[[], Any] | None,
        watch: Callable[[], Any] | None,
        result: RecipeRun,
    ) -> None:
        self.out, self.quiet, self.say, self.result = planned.out, quiet, say, result
        self.progress = progress or nullcontext
        self.watch = watch or (lambda: nullcontext((None, None)))
        self.contents: dict[str, str] = {}
        self.total = len({name for plan in plans for name in plan.stages})
        self.shown = shown_names((stage for plan in planned.cells for stage in plan.stages.values()), planned.out)
        words = ["rehead", "run", planned.recipe.name, *(w for setting in settings for w in ("--set", setting))]
        self.command = shlex.join(words)

    def cell(self, plan: CellPlan) -> None:
        for stage in plan.stages.values():
            if stage.name not in self.contents:
                self.contents[stage.name] = self.stage(stage)

    def stage(self, stage: Stage) -> str:
        """Run or skip a stage; the hash of what later stages read."""
        inputs = {role: self.contents[place.stage] for role, place in stage.models.items() if place.stage is not None}
        around = outside(stage)
        with self.locked(stage):
            finished = state(stage, self.out, inputs, around)
            if finished.done:
                self.say("skip", stage.kind, stage.title)
                self.result.stages.append(StageOutcome(stage.name, stage.kind, stage.title, "skipped", "", 0.0))
                return finished.content
            self.say("run", stage.kind, f"{stage.title}  (stage {len(self.result.stages) + 1} of {self.total})")
            drop(stage, self.out)
            started = time.monotonic()
            with self.progress() if stage.kind not in TRAININGS else nullcontext() as progress:
                run_stage(stage, Site(self.out, self.command, self.shown, self.quiet, progress, self.watch))
            seconds = time.monotonic() - started
            content = write_record(stage, self.out, inputs, around, seconds)
        free_memory()
        self.say("done", stage.kind, f"{stage.title}  {seconds:.1f} s")
        self.result.stages.append(
            StageOutcome(stage.name, stage.kind, stage.title, "done", finished.reason, round(seconds, 2))
        )
        return content

    @contextmanager
    def locked(self, stage: Stage) -> Iterator[None]:
        """One run at a time makes a stage; another that needs it waits, and then finds it done."""
        from filelock import FileLock, Timeout

        folder = self.out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{stage.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.say("wait", stage.kind, f"{stage.title}: another run is making it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
