"""What a recipe may say; the sections' own keys are those of the commands (:mod:`rehead.recipes.pipeline.sections`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rehead.options import Options


class Requires(Options):
    """What the machine must have before anything is started.

    Attributes:
        gpus: CUDA devices.
    """

    gpus: int = Field(default=0, ge=0)


class Launch(Options):
    """Uptraining in several processes, started by ``accelerate launch``.

    Attributes:
        processes: how many on this machine.
        config: ``ddp``, ``fsdp2``, or an accelerate config file.
    """

    processes: int = Field(default=1, ge=1)
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
