"""What a recipe may say; the sections' own keys are those of the commands (:mod:`rehead.recipes.pipeline.sections`)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rehead.errors import UsageError, unknown_name


class Strict(BaseModel):
    """A model that takes no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Requires(Strict):
    """What the machine must have before anything is started.

    Attributes:
        gpus: CUDA devices.
    """

    gpus: int = Field(default=0, ge=0)


class Launch(Strict):
    """Uptraining in several processes, started by ``accelerate launch``.

    Attributes:
        processes: how many on this machine.
        config: ``ddp``, ``fsdp2``, or an accelerate config file.
    """

    processes: int = Field(default=1, ge=1)
    config: str = "ddp"


class Recipe(Strict):
    """A recipe: convert -> uptrain -> evaluate -> report, each stage where its section is given.

    Attributes:
        name: what the report is headed with and the output folder is called.
        description: one line for ``rehead recipes ls``.
        model: a folder, a Hub id, ``embedded`` or ``smollm2``; or none, when ``new`` makes one.
        revision: Hub revision of ``model``.
        new: a model made from scratch: the keys of :class:`rehead.recipes.scratch.NewModel`, and ``data``, which its
            tokenizer is trained on.
        out: the folder for everything the recipe makes; beside the recipe when relative.
        device: where everything runs: ``auto``, ``cpu``, ``cuda``, ...
        requires: what the machine must have.
        launch: uptraining in several processes.
        convert: options of ``rehead convert``; None converts nothing.
        uptrain: options of ``rehead uptrain``; None trains nothing. ``tokens`` may be a share of pretraining_tokens,
            e.g. ``5%``.
        pretraining_tokens: how many the model was pretrained on, e.g. ``2T``.
        control: whether the unconverted model is uptrained on the same tokens, too, by cross-entropy, so that what the
            conversion cost is told from what the text taught; a mapping changes options of that run.
        evaluate: options of ``rehead evaluate``, and ``before`` (default true): measure the conversion before its
            uptraining as well.
        sweep: axes of a product of cells. ``convert.method: [mean, svd]`` varies one key; an axis that is a mapping
            has named values of several keys each, ``start: {plain: {convert.method: mean}, ...}``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: str | None = None
    revision: str | None = None
    new: dict[str, Any] | None = None
    out: str | None = None
    device: str = "auto"
    requires: Requires = Requires()
    launch: Launch | None = None
    convert: dict[str, Any] | None = None
    uptrain: dict[str, Any] | None = None
    pretraining_tokens: str | int | None = None
    control: bool | dict[str, Any] = True
    evaluate: dict[str, Any] | None = None
    sweep: dict[str, list[Any] | dict[str, dict[str, Any]]] | None = None


def checked(model: type[BaseModel], values: Any, where: str) -> Any:
    """``values`` as an instance of a pydantic model.

    Args:
        model: what they must be.
        values: from YAML.
        where: the recipe and section, for messages.

    Raises:
        UsageError: an unknown key (the nearest is suggested), a missing one, or a value that cannot be meant.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where}: is {type(values).__name__}, not a mapping; give it keys")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UsageError(explained(error, where, model)) from None


def explained(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One line for pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"]]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(model, steps[:-1])
        return f"{where}: {unknown_name('key', '.'.join(steps), ['.'.join([*steps[:-1], name]) for name in known])}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: {'.'.join(steps)} is missing; give it"
    if not steps:  # a rule over several keys, which names them itself
        return f"{where}: {first['msg'].removeprefix('Value error, ')}; mend it"
    given = repr(first.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    return f"{where}: {'.'.join(steps)}: {given}: {_sentence(first['msg'])}; mend it"


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _keys_at(model: type[BaseModel], steps: list[str]) -> list[str]:
    """The keys that a model knows at a place in it."""
    for step in steps:
        found = model.model_fields.get(step)
        inner = [kind for kind in _kinds(found.annotation) if kind is not None] if found else []
        if not inner:
            break
        model = inner[0]
    return list(model.model_fields)


def _kinds(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models among an annotation's alternatives."""
    options = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
