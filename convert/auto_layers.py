"""Choosing the layers whose change loses least, up to a budget: the model is run whole, unlike everything else here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rehead.convert.options import ConvertOptions
from rehead.convert.variants import check_lengths
from rehead.convert.whole_model import load_whole
from rehead.errors import UnsupportedError, UsageError
from rehead.models.model import Model
from rehead.models.recall import fitting, recall_texts
from rehead.variants.blocks.forms import reblock
from rehead.variants.blocks.switches import SWITCHES
from rehead.variants.layer_choice import auto_count

#: Numbers of logits that are kept to compare with, and the fewest tokens to measure on.
_LOGITS, _FEWEST = 1 << 27, 1024
#: Texts that windows are measured on, and those that are recalled from at each distance, by the kind of device.
_WINDOW_TEXTS = {"cpu": (2, 1), "cuda": (4, 2)}


def choose(
    model: Model,
    options: ConvertOptions,
    device: torch.device,
    progress: Callable[[str, float, float], None] | None = None,
) -> tuple[ConvertOptions, dict[str, Any]]:
    """Fill in ``--layers auto``.

    Returns:
        (the options with the layers named, what was measured, for the manifest).

    Raises:
        UsageError: the calibration text cannot be used, or no layer fits the budget.
        UnsupportedError: the class switches all layers together, or the model cannot be loaded.
    """
    from rehead.data.calibration import load_calibration
    from rehead.variants.ranking import choose_layers
    from rehead.variants.stack import live_variant

    assert isinstance(options.layers, str)
    vocab = int(model.config.vocab_size)
    lengths = options.lengths_within(getattr(model.config, "max_position_embeddings", None))
    trials = 0
    if options.window is not None:
        name, longest = "window", max(lengths)
        told = {"size": options.window, "sinks": options.sinks, "sink_logit": options.sink_logit}
        check_lengths(model, options)
        rows, trials = _WINDOW_TEXTS.get(device.type, _WINDOW_TEXTS["cuda"])
        count = min(options.calibration_tokens, rows * longest)
    else:
        assert options.block is not None
        if model.config.model_type in SWITCHES:
            raise UnsupportedError(
                f"{model.config.model_type}: its class switches all layers together; leave --layers out"
            )
        reblock(model, options.block, None, options.plain)
        name, told, longest = options.block, {}, min(lengths)
        count = min(options.calibration_tokens, max(_FEWEST, _LOGITS // vocab))
    text = load_calibration(
        options.calibration, model.source, vocab, max(count, longest), [min(longest, count)], options.seed
    )
    live = load_whole(model, device, "choose layers", "name --layers")
    asked = auto_count(options.layers, int(model.config.num_hidden_layers))
    recalled = []
    if options.window is not None:
        distances = fitting((2 * options.window, 3 * options.window), live)
        recalled = recall_texts(text.tokens[0].flatten(), distances, trials=trials, seed=options.seed)
    choice = choose_layers(
        live_variant(live, name, **told),
        text.tokens[0],
        kl_budget=options.kl_budget,
        count=asked,
        recalled=recalled,
        progress=progress,
    )
    wanted = min(asked or 0, len(choice.alone))  # some may have that form already
    if options.kl_budget is None and len(choice.layers) < wanted:
        raise UsageError(
            f"--layers {options.layers}: only {len(choice.layers)} of {wanted} layers can be {name} and leave "
            "finite logits; ask for fewer"
        )
    if not choice.layers:
        least = choice.alone[0]
        assert options.kl_budget is not None
        raise UsageError(
            f"--kl-budget {options.kl_budget:g}: the layer that loses least, {least.layer}, loses {least.kl:.3g} nats; "
            "raise the budget or name --layers"
        )
    facts = {
        "asked": options.layers,
        "kl_budget": options.kl_budget,
        "kl": round(choice.kl, 6),
        **({"recalled_from": sorted({text.distance for text in recalled})} if recalled else {}),
        **({"compared": {key: round(kl, 6) for key, kl in choice.compared.items()}} if choice.compared else {}),
        "tokens": text.count,
        "text": text.names,
        "path": [[layer, round(kl, 6)] for layer, kl in choice.path],
        # A layer that overflows has no figure that JSON could hold.
        "alone": {str(loss.layer): round(loss.kl, 6) if math.isfinite(loss.kl) else None for loss in choice.alone},
    }
    return options.but(layers=tuple(choice.layers), kl_budget=None), facts
