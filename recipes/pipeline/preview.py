"""What a run would do, without doing it: which stages hold, and what each conversion would change."""

from __future__ import annotations

from typing import Any

from rehead.recipes.pipeline.graph import CONVERT, Stage
from rehead.recipes.pipeline.record import name_of, outside, state
from rehead.recipes.pipeline.run import Planned


def preview(planned: Planned, cell: int | None = None) -> list[dict[str, Any]]:
    """The stages of a recipe, each once.

    Reads configs and headers of models that are there already, and hashes the outputs of stages that have been run.

    Args:
        planned: from :func:`rehead.recipes.pipeline.run.plan_recipe`.
        cell: of one cell only.

    Returns:
        for each stage its name, kind, title, ``"run"`` or ``"keep"``, the reason, and of a conversion the change of KV
        heads and cache, where its model is there to be read.

    Raises:
        UsageError: there is no such cell, model or text.
        UnsupportedError: a model cannot be converted that way.
    """
    plans = planned.cells if cell is None else [planned.cell(cell)]
    contents: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for stage in (stage for plan in plans for stage in plan.stages.values()):
        if stage.name in rows:
            continue
        before = {role: place.stage for role, place in stage.models.items() if place.stage is not None}
        absent = [name for name in before.values() if name not in contents]
        if absent:
            action, reason = "run", ""
        else:
            finished = state(stage, planned.out, {r: contents[n] for r, n in before.items()}, outside(stage))
            action, reason = ("keep", "") if finished.done else ("run", finished.reason)
            if finished.done:
                contents[stage.name] = finished.content
        rows[stage.name] = {
            "name": stage.name, "kind": stage.kind, "title": stage.title, "action": action, "reason": reason,
            "change": conversion(stage) if stage.kind == CONVERT and not absent else "",
        }  # fmt: skip
    return list(rows.values())


def conversion(stage: Stage) -> str:
    """``"8 -> 2 KV heads, 5,120 -> 1,280 bytes of KV cache per token"``; empty for a model that a stage will make.

    Raises:
        ReheadError: as :func:`rehead.convert.planning`.
    """
    from rehead.convert import plan

    place = stage.models["model"]
    if place.model is None:
        return ""
    name, revision = name_of(place)
    options = {key: value for key, value in stage.options.items() if key != "device"}
    if str(options.get("layers") or "").startswith("auto"):
        return f"layers {options['layers']}: chosen by running the model"
    facts = plan(name, revision=revision, calibration=stage.data["calibration"], **options).as_json()
    heads, cache = facts["num_key_value_heads"], facts["kv_bytes_per_token"]
    before, after = f"{cache['before']:,}", f"{cache['after']:,}"
    return f"{heads['before']} -> {heads['after']} KV heads, {before} -> {after} bytes of KV cache per token"
