"""The sections of a recipe, checked by the same models that make the commands' flags."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from rehead.convert.options import ConvertOptions
from rehead.errors import UsageError
from rehead.options import parse_count
from rehead.recipes.evaluation.options import EvaluateOptions
from rehead.recipes.scratch import NewModel
from rehead.recipes.training.options import UptrainOptions


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
    except ValueError:
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
