"""Evaluations of a recipe's cells -> one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from rehead.errors import UsageError, VerificationError, first_line
from rehead.recipes.evaluation.output import FILE as EVALUATION
from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.pipeline.graph import CellPlan
from rehead.recipes.report import Entry, ReportPaths, write_report


def gather(plans: Sequence[CellPlan], out: Path, folder: Path) -> ReportPaths:
    """Write one report of the cells' evaluations that are there.

    Args:
        plans: the cells.
        out: the recipe's folder.
        folder: where the report goes.

    Raises:
        UsageError: no cell has been evaluated.
        VerificationError: an evaluation is broken.
    """
    entries, trainings, missing = [], [], []
    for plan in plans:
        evaluations = [(out / name / EVALUATION, stage, label) for name, stage, label in plan.evaluations]
        absent = [path for path, _, _ in evaluations if not path.is_file()]
        if absent:
            missing.append(plan.cell)
            continue
        many = len(evaluations) > 1
        for path, stage, label in evaluations:
            title = f"{label}, {stage}" if stage and (many or stage == "uptrained") else label
            entries.append(Entry(title, read_evaluation(path), plan.cell.series or _how(plan), stage))
        trainings += [(plan.cell.label or label, out / name) for label, name in plan.trainings if (out / name).is_dir()]
    if not entries:
        raise UsageError(f"{out}: no cell has been evaluated yet; run the recipe, or its cells with --cell K, first")
    notes = []
    if missing:
        listed = ", ".join(f"{cell.index} ({cell.label})" for cell in missing)
        notes = [f"Not in this report, since they have not been run: {len(missing)} of {len(plans)} cells: {listed}."]
    recipe = plans[0].recipe
    title = f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name
    return write_report(folder, entries, trainings, title=title, notes=notes)


def _how(plan: CellPlan) -> str:
    """A series for a recipe without a sweep: how it converts, without the number of heads."""
    convert = next((stage for stage in plan.stages.values() if stage.kind == "convert"), None)
    return convert.title.partition(", ")[2] if convert else plan.recipe.name


def read_evaluation(path: Path) -> Evaluation:
    """A stage's evaluation.

    Raises:
        VerificationError: it is broken.
    """
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise VerificationError(
            f"{path}: is no evaluation ({first_line(error)}); remove its folder and run again"
        ) from None


def failed_gates(plans: Sequence[CellPlan], out: Path) -> list[str]:
    """The quality gates that were not met, one phrase each."""
    failed = []
    for plan in plans:
        for name, _, label in plan.evaluations:
            path = out / name / EVALUATION
            gates = json.loads(path.read_bytes()).get("gates", []) if path.is_file() else []
            failed += [f"{label}: {gate['name']} is {gate['value']:.4g}, the limit {gate['limit']:.4g}"
                       for gate in gates if not gate["passed"]]  # fmt: skip
    return failed
