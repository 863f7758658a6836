"""Latent attention as a step of a conversion: its sizes, which the text may decide, and its two changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.console import Progress
from rehead.data.calibration import CalibrationText, load_calibration
from rehead.errors import UsageError, unknown_name
from rehead.healing.run import Observed, observe
from rehead.lazy import late
from rehead.models.model import Model
from rehead.models.rewritten import rewritten
from rehead.variants.latent.angles import angles_of
from rehead.variants.latent.export import HOSTS
from rehead.variants.latent.linear import made_linear, needs_of
from rehead.variants.latent.options import ENGINES, LatentOptions, cache_numbers
from rehead.variants.latent.pairs import enough_pairs, fastest, turning_energy, undecided
from rehead.variants.latent.rewrite import check_source, latent, span, stored
from rehead.variants.latent.settle import settle
from rehead.variants.latent.sizes import splits
from rehead.variants.latent.solve import solve
from rehead.variants.latent.trial import trial

if TYPE_CHECKING:
    import torch

    from rehead.convert.options import ConvertOptions
else:
    torch = late("torch")

#: Tokens on which the pairs that keep turning are chosen, and how far back they must have been seen to turn.
_TOKENS, _REACH = 32768, 512
#: A fit that tries a split takes this part of the steps of the real one.
_SHORT = 6
#: Pairs are kept in multiples of this many: kernels want whole blocks of dimensions.
_MULTIPLE = 4


def with_latent(model: Model, options: ConvertOptions, code: str | None) -> tuple[Model, Model]:
    """(the model with latent layers at their natural scale, the same in its host); no weight is read.

    Args:
        code: safetensors dtype to write, or None for the source's.

    Raises:
        UsageError: a size is out of range.
        UnsupportedError: the host cannot hold the model.
    """
    asked, angles = _asked(model, options), angles_of(model)
    asked = settle(asked, angles, *span(model))
    live = rewritten(model, latent(model, asked, angles, options.refit, options.fit > 0))
    return live, rewritten(live, stored(live, model, asked, angles, code))


def choose_sizes(
    model: Model, options: ConvertOptions, device: torch.device, progress: Progress | None = None
) -> tuple[ConvertOptions, dict[str, Any]]:
    """Fill in what the options leave to the text: how many rotary pairs keep turning.

    Returns:
        (the options with all sizes as numbers, what was measured, for the manifest).

    Raises:
        UsageError: a size is out of range, or the text is too short to tell.
        UnsupportedError: the host cannot hold the model.
    """
    asked, angles = _asked(model, options), angles_of(model)
    with_latent(model, options, None)  # refuses before the model is run
    positions = getattr(model.config, "max_position_embeddings", None)
    lengths = options.lengths_within(positions)
    facts: dict[str, Any] = {}
    pairs = None
    if asked.rope_dims is None:
        text = _text(model, options, min(_REACH, max(lengths)))
        some = [model.layers[len(model.layers) * part // 6] for part in (1, 3, 5)]
        energies, kept = [], []
        needs = needs_of(model.family.norm_of(model.config) != "none")
        for seen in observe(model, text, needs, 1, device, progress, some if asked.kv_cache is not None else ()):
            seen = replace(seen, heads=made_linear(seen.heads, seen.moments, asked.fold_biases, 0.0)[0])
            energies.append(turning_energy(seen.heads, seen.moments))
            kept += [seen] if seen.outputs else []
        pairs = enough_pairs(energies, angles.to(energies[0].device), multiple=_MULTIPLE)
        mean = torch.stack([energy.cpu() for energy in energies]).mean(0)
        facts = {"turning": [round(float(share), 5) for share in mean], "tokens": text.count, "text": text.names}
        if kept:
            errors = _tried(asked, angles, pairs, span(model), kept, options.fit // _SHORT, options.seed)
            pairs = min(errors, key=lambda count: errors[count]) if errors else pairs
            facts["tried"] = {2 * count: round(error, 6) for count, error in errors.items()}
    settled = settle(asked, angles, *span(model), pairs)
    turning = torch.arange((settled.rope_dims or 0) // 2)
    if asked.rope_dims is None:
        reach = min(_REACH, positions or _REACH)
        if short := undecided(angles, turning, max(lengths), reach):
            raise UsageError(
                f"--calibration-length {max(lengths)}: too short to tell whether {len(short)} rotary pairs may stop "
                f"turning, which they hardly do within it; give {reach} or more, or name --rope-dims"
            )
    unseen = undecided(angles, turning, max(lengths), positions or max(lengths))
    facts |= {"rank": settled.rank, "rope_dims": settled.rope_dims, "pairs_not_seen_to_turn": unseen}
    return options.but(latent=settled.rank, rope_dims=settled.rope_dims, kv_cache=None), {"latent": facts}


def _tried(
    asked: LatentOptions,
    angles: torch.Tensor,
    enough: int,
    spanned: tuple[int, int],
    seen: list[Observed],
    steps: int,
    seed: int,
) -> dict[int, float]:
    """Mean error of some layers after a short fit by number of rotary pairs, at the cache's size."""
    assert asked.kv_cache is not None
    numbers, most = spanned
    errors = {}
    for count, rank in splits(cache_numbers(asked.kv_cache, numbers), enough, len(angles), _MULTIPLE):
        if rank > most:
            continue
        of_layers = []
        for layer in seen:
            latent = solve(layer.heads, layer.moments, angles, fastest(angles, count), rank).latent
            of_layers.append(trial(latent, layer.inputs[0], layer.outputs[0], steps, seed))
        errors[count] = sum(of_layers) / len(of_layers)
    return errors


def _asked(model: Model, options: ConvertOptions) -> LatentOptions:
    check_source(model)
    host = options.host or "deepseek_v3"
    if host not in HOSTS:
        raise UsageError(unknown_name("host of latent attention", host, HOSTS))
    return LatentOptions.parse(
        {
            "rank": options.latent,
            "rope_dims": options.rope_dims,
            "kv_cache": options.kv_cache,
            "fold_biases": options.fold_biases,
            "half_scale": options.half_scale,
            "host": host,
            "engine": options.engine if options.engine in ENGINES else None,  # others take the class as it is
        }
    )


def _text(model: Model, options: ConvertOptions, length: int) -> CalibrationText:
    """Some of the calibration text, in sequences of one length.

    Over longer ones ever slower pairs are seen to turn, and what keeping them takes from the latent costs more than
    they hold (SmolLM2-135M at a third of the cache: 24 pairs instead of 16 raise the divergence by a quarter).
    """
    tokens, vocabulary = min(options.calibration_tokens, _TOKENS), int(model.config.vocab_size)
    return load_calibration(options.calibration, model.source, vocabulary, tokens, (length,), options.seed)
