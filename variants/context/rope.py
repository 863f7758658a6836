"""RoPE parameters for a longer context, in transformers' form: pure functions of the old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rehead.errors import UnsupportedError, UsageError
from rehead.variants.context.options import ContextOptions

BETA_FAST, BETA_SLOW = 32.0, 1.0
"""Turns within the original length from which on YaRN leaves a pair alone, and below which it slows it down fully."""


def stretched(
    parameters: dict[str, Any], dims: int, trained: int, options: ContextOptions, named: str = ""
) -> dict[str, Any]:
    """The RoPE parameters of one kind of layer under which it reads longer texts.

    Args:
        parameters: the old ones, with ``rope_theta``.
        dims: dimensions of a head that rotate.
        trained: tokens that the model was trained to read.
        options: what is asked for; ``drope`` is not expressed here.
        named: the model's type, for messages.

    Raises:
        UsageError: not longer, or factors of a wrong number or below 1.
        UnsupportedError: the present RoPE cannot be stretched that way.
    """
    factor = stretch(trained, options)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if parameters.get(key) is not None}
    old = float(parameters.get("factor") or 1.0)
    if kind != "default" and (kind != "linear" or options.rope not in ("linear", "longrope", "fitted")):
        ways = (
            "; give --rope linear, longrope or fitted" if kind == "linear" else "; convert the model from before that"
        )
        raise UnsupportedError(f"{named}: its RoPE is stretched already ({kind}){ways}")
    if options.rope == "linear":
        return {**kept, "rope_type": "linear", "factor": old * factor}
    if options.rope == "ntk":
        return {**kept, "rope_type": "default", "rope_theta": ntk_theta(kept["rope_theta"], factor, dims)}
    if options.rope == "dynamic":
        return {**kept, "rope_type": "dynamic", "factor": factor}
    if options.rope == "yarn":
        return {**kept, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    yarn = yarn_factors(float(kept["rope_theta"]), dims, trained, factor)
    long = [old * each for each in checked_factors(options.factors or yarn, dims // 2)]
    # vLLM reads no attention_factor, and scales queries and keys without these.
    mscales = {"short_mscale": 1.0, "long_mscale": 1.0} if options.engine == "vllm" else {}
    return {
        **kept,
        **mscales,
        "rope_type": "longrope",
        "factor": factor,
        "short_factor": [old] * (dims // 2),
        "long_factor": long,
        # What it defaults to would scale short texts too.
        "attention_factor": 1.0,
        "original_max_position_embeddings": trained,
    }


def stretch(trained: int, options: ContextOptions) -> float:
    """How many times longer the context becomes.

    Raises:
        UsageError: it does not.
    """
    if options.tokens <= trained:
        raise UsageError(f"--context {options.tokens}: the model reads {trained} tokens already; give more than that")
    return options.tokens / trained


def ntk_theta(theta: float, factor: float, dims: int) -> float:
    """The base under which the slowest pair turns ``factor`` times slower and the fastest as before ("NTK-aware")."""
    return float(theta) * factor ** (dims / (dims - 2)) if dims > 2 else float(theta) * factor


def yarn_factors(theta: float, dims: int, trained: int, factor: float) -> list[float]:
    """How much slower YaRN lets each pair turn (Peng et al. 2023, arXiv 2309.00071), without its temperature.

    Pairs that turn 32 times or more within the original length keep their pace, those that do not finish one turn are
    slowed down fully, the others in between.
    """

    def place(turns: float) -> float:
        return dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(BETA_FAST)), 0), min(math.ceil(place(BETA_SLOW)), dims - 1)
    factors = []
    for pair in range(dims // 2):
        slowed = min(1.0, max(0.0, (pair - low) / (high - low if high > low else 0.001)))
        factors.append(1.0 / ((1.0 - slowed) + slowed / factor))
    return factors


def checked_factors(factors: Sequence[float], count: int) -> list[float]:
    """The factors of ``count`` rotary pairs.

    Raises:
        UsageError: another number of them, or one below 1, under which a pair would turn faster than it was trained to.
    """
    if len(factors) != count:
        raise UsageError(f"--rope-factors: {len(factors)} numbers for {count} rotary pairs; give one for each")
    if low := [factor for factor in factors if factor < 1]:
        raise UsageError(f"--rope-factors: {low[0]:g} is below 1, so that pair would turn faster; give 1 or more")
    return [float(factor) for factor in factors]
