"""Fitting a longer context's rotary pairs before a conversion: the model is run whole, unlike in most of them."""

from __future__ import annotations

from typing import Any

import torch

from rehead.console import Progress
from rehead.convert.options import ConvertOptions
from rehead.convert.whole_model import load_whole
from rehead.models.families.spec import steady_length
from rehead.models.model import Model
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.rewrite import context_rewrite


def fit_context(
    model: Model, options: ConvertOptions, device: torch.device, progress: Progress | None = None
) -> tuple[ConvertOptions, dict[str, Any]]:
    """Fill in the factors of ``--rope fitted``.

    Returns:
        (the options with the factors, what was measured, for the manifest).

    Raises:
        UsageError, UnsupportedError: the calibration text cannot be used, or the class cannot hold the result.
    """
    from rehead.data.calibration import load_calibration
    from rehead.variants.context.fit import fit_factors

    asked = next(asked for variant, asked in options.asked_variants if isinstance(asked, ContextOptions))
    context_rewrite(model, asked)  # which refuses what no class holds before the model is loaded
    vocab = int(model.config.vocab_size)
    length = max(options.lengths_within(steady_length(model.config)))
    text = load_calibration(
        options.calibration, model.source, vocab, max(options.calibration_tokens, length), [length], options.seed
    )

    def tick(done: float, total: float) -> None:
        if progress is not None:
            progress("fitting rotary pairs", done, total)

    live = load_whole(model, device, "fit its rotary pairs", "give --rope yarn")
    fitted = fit_factors(live, text.tokens[0], asked, seed=options.seed, progress=tick)
    facts = {
        "factors": fitted.factors,
        "loss": {"yarn": round(fitted.before, 5), "fitted": round(fitted.after, 5)},
        "tokens": text.count,
        "text": text.names,
    }
    return options.but(rope_factors=tuple(fitted.factors)), {"fitted_context": facts}
