"""What a recipe may say; the sections' own keys are those of the commands (:mod:`rehead.recipes.pipeline.schema`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from rehead.convert.options import ConvertOptions
from rehead.counts import parse_count
from rehead.errors import UsageError
from rehead.options import Options
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.scratch import NewModel
from rehead.recipes.training.options import UptrainOptions


class Requires(Options):
    """What the machine must have before anything is started.

    Attributes:
        gpus: CUDA devices.
    """

    gpus: int = Field(default=0, ge=0, le=1024)


class Launch(Options):
    """Uptraining in several processes, started by ``accelerate launch``.

    Attributes:
        processes: how many on this machine.
        config: ``ddp``, ``fsdp2``, or an accelerate config file.
    """

    processes: int = Field(default=1, ge=1, le=1024)
    config: str = "ddp"


class Recipe(Options):
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


def convert_options(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The ``convert`` section as keyword arguments of :func:`rehead.convert.convert`; raises as ``Options.parse``."""
    return ConvertOptions.parse(values, where).model_dump(mode="json")


def uptrain_options(values: dict[str, Any], where: str, device: str) -> dict[str, Any]:
    """The ``uptrain`` section as keyword arguments of :func:`rehead.recipes.uptrain`; raises as ``Options.parse``."""
    return UptrainOptions.parse({"device": device, **values}, where).as_json()


def share_of(tokens: Any, pretraining: str | int | None, where: str) -> Any:
    """``"5%"`` of the pretraining's tokens as a number; anything else as it is.

    Raises:
        UsageError: no share, or nothing to take it of.
    """
    if not isinstance(tokens, str) or not tokens.strip().endswith("%"):
        return tokens
    if pretraining is None:
        raise UsageError(f"{where}: tokens {tokens} is a share of pretraining_tokens, which is missing; give it")
    try:
        count = int(float(tokens.strip().removesuffix("%")) / 100 * parse_count(str(pretraining)))
    except (ValueError, OverflowError):
        raise UsageError(f"{where}: {tokens} of pretraining_tokens {pretraining}: no number; write 5% and 2T") from None
    if count < 1:
        raise UsageError(f"{where}: {tokens} of {pretraining} tokens is none; give more")
    return count


def control_options(uptrain: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """The control's options: the uptraining's, by cross-entropy and without a teacher, with the section's changes."""
    plain = {"loss": "ce", "teacher": None, "joint_layers": 0}
    return uptrain_options({**uptrain, **plain, **changes}, where, str(uptrain["device"]))


def evaluate_options(values: dict[str, Any], where: str, device: str) -> tuple[list[str], bool, dict[str, Any]]:
    """The ``evaluate`` section: texts, whether to evaluate before uptraining too, and the command's options.

    Raises:
        UsageError: as ``Options.parse``, or there is no text.
    """
    section: Any = create_model("EvaluateSection", __base__=EvaluateOptions, data=(list[str] | str, Field(...)),
                                before=(bool, True))  # fmt: skip
    options = section.parse({"device": device, **values}, where).as_json()
    data, before = options.pop("data"), options.pop("before")
    data = [data] if isinstance(data, str) else data
    if not data:
        raise UsageError(f"{where}: data is empty; name at least one text to evaluate on")
    return data, before, options


def new_options(values: dict[str, Any], where: str) -> tuple[list[str], dict[str, Any]]:
    """The ``new`` section: texts for the tokenizer, and the model's shape.

    Raises:
        UsageError: as ``Options.parse``, or there is no text.
    """
    values = dict(values)
    data = values.pop("data", [])
    data = [data] if isinstance(data, str) else list(data or [])
    if not data:
        raise UsageError(f"{where}: data is missing; name the texts that the tokenizer is trained on")
    return data, NewModel.parse(values, where).as_json()
