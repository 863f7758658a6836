"""A model with every option of every layer prepared and measured: what the curve and the choice both start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rehead.console import Progress
from rehead.convert.budget.library import Library, library
from rehead.convert.budget.mix import Meter, Mix, Sample
from rehead.convert.budget.options import SurveyOptions
from rehead.convert.budget.prepare import calibrated_states, estimate, solve_forms
from rehead.convert.budget.samples import running_text, samples
from rehead.convert.budget.search import Predictor
from rehead.convert.whole_model import load_whole
from rehead.data.calibration import load_calibration
from rehead.errors import UnsupportedError, UsageError
from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.variants.latent.options import cache_numbers

#: The context that caches are compared at where nobody says, at most, and the texts to measure on, in tokens.
_CONTEXT, _SHORTEST, _LONGEST = 8192, 512, 2048
#: Tokens to measure on and to calibrate on where nobody says, by the kind of device.
_TOKENS, _CALIBRATION = {"cpu": 4096}, {"cpu": 16384}
_MOST_TOKENS, _MOST_CALIBRATION = 8192, 32768
#: Tokens that sink logits are fitted to.
_STATE_TOKENS = 8192


@dataclass
class Survey:
    """A model's options, ready to be chosen from.

    Attributes:
        options: of every layer.
        mix: the live model.
        predictor, meter: of losses.
        facts: what was run on which text; JSON.
    """

    options: Library
    mix: Mix
    predictor: Predictor
    meter: Meter
    facts: dict[str, Any]


@contextmanager
def survey(
    model: Model,
    asked: SurveyOptions,
    device: torch.device,
    progress: Progress | None = None,
    keep: Callable[[Library], Library] = lambda options: options,
) -> Iterator[Survey]:
    """Load a model whole and prepare every option of its layers; the context of a :class:`Survey`.

    Args:
        model: an open checkpoint.
        asked: context and texts.
        device: where everything runs.
        progress: called with (stage, done, total).
        keep: what of the library to prepare.

    Raises:
        UsageError: the text cannot be used, or the context is longer than the model's positions.
        UnsupportedError: the model cannot be loaded, or no option is left.
    """
    asked = asked.but(
        tokens=asked.tokens or _TOKENS.get(device.type, _MOST_TOKENS),
        calibration_tokens=asked.calibration_tokens or _CALIBRATION.get(device.type, _MOST_CALIBRATION),
    )
    assert asked.tokens is not None
    assert asked.calibration_tokens is not None
    context, length = lengths(model, asked)
    options = keep(library(model, context, length))
    _check_some(options, model)
    vocabulary = int(model.config.vocab_size)
    text = load_calibration(
        asked.calibration, model.source, vocabulary, asked.calibration_tokens, (length,), asked.seed
    )
    running = running_text(model, asked.calibration, asked.tokens, length, asked.seed)
    live = load_whole(model, device, "measure it")
    every = [option for each in options.layers.values() for option in each]
    states = calibrated_states(live, options, text.tokens[0][: max(1, _STATE_TOKENS // length)])
    with Mix(live, model, every) as mix:
        options = solve_forms(mix, model, options, text, states, progress)
        _check_some(options, model)
        texts = samples(model, running, asked.seed)
        rows = text.tokens[0][: max(1, asked.tokens // length)]
        fitted = Sample("fitted", rows, torch.ones(length, dtype=torch.bool))
        estimates = estimate(mix, options, fitted, texts, asked.seed, progress)
        facts = {
            "context": context,
            "layer_count": len(options.layers),
            "calibration": {"text": text.names, "tokens": text.count, "length": length},
            "measured_on": {sample.name: sample.count for sample in texts},
            "device": str(device),
        }
        yield Survey(options, mix, Predictor(options, estimates), Meter(mix, texts), facts)


def _check_some(options: Library, model: Model) -> None:
    if all(len(each) == 1 for each in options.layers.values()):
        if model.family.hosted:
            raise UnsupportedError(
                f"{model.source.id}: {model.config.model_type}'s class holds as many KV heads as query heads; convert "
                "it with --host auto, and choose a cache for the result"
            )
        why = "; ".join(f"{name}: {reason}" for name, reason in options.blocked.items()) or "no variant offers any"
        raise UnsupportedError(f"{model.source.id}: no layer has a form with a smaller cache ({why})")


def lengths(model: Model, asked: SurveyOptions) -> tuple[int, int]:
    """(tokens at which caches are compared, tokens of a text to measure on).

    Raises:
        UsageError: a context beyond the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    context = asked.context or min(positions or _CONTEXT, _CONTEXT)
    if positions is not None and context > positions:
        raise UsageError(f"--context {context}: the model has positions for {positions} tokens; give that or less")
    length = min(max(context // 8, _SHORTEST), _LONGEST, positions or _LONGEST)
    return context, min(length, asked.tokens or length)


def budget_of(text: str, options: Library) -> int:
    """Bytes of a budget given as a share such as ``33%`` of the model's cache, or as numbers per token and layer.

    Raises:
        UsageError: it is neither, or no smaller cache.
    """
    some = next(iter(options.layers.values()))[0].layout
    numbers = checked_size(text, some)
    if text.strip().endswith("%"):
        return int(options.whole * float(text.strip()[:-1]) / 100)
    return options.whole * numbers // some.numbers_per_token


def checked_size(text: str, layout: LayerLayout) -> int:
    """Numbers per token and layer of a budget, about as many for a share; the model is not needed for that.

    Raises:
        UsageError: as :func:`budget_of`.
    """
    numbers = cache_numbers(text, layout.numbers_per_token)
    if "%" not in text and not 0 < numbers < layout.numbers_per_token:
        raise UsageError(
            f"--kv-cache {text}: the model caches {layout.numbers_per_token} numbers; give less, or a share"
        )
    return numbers
