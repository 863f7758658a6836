"""How well a budget's predictions order what is measured: random mixes of every layer's options.

    python -m rehead.benchmarks.budget MODEL [--count 24] [--kinds latent,pool] [--tokens 8192] [--context N]

A mix changes a random share of the layers, from a model that is nearly whole to one that is lost. Predictions are of
closed forms, from one backward pass (:mod:`rehead.convert.budget.prepare`); the measure is the KL of the mix on running
text plus that on copying. Prints both of every mix, and Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.convert.budget.library import Library, Option
from rehead.convert.budget.options import SurveyOptions
from rehead.convert.budget.survey import survey
from rehead.models.live import resolve_device
from rehead.models.model import open_model


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, of values that all differ."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def random_choice(options: Library, draw: random.Random) -> dict[int, Option]:
    """Some share of the layers, drawn too, in random options."""
    share = draw.random()
    return {
        layer: draw.choice(each[1:]) if len(each) > 1 and draw.random() < share else each[0]
        for layer, each in options.layers.items()
    }


def different_choices(options: Library, draw: random.Random, count: int) -> list[dict[int, Option]]:
    """Mixes that differ from one another and from the model as it is; fewer where so many are not found."""
    drawn: dict[tuple[str, ...], dict[int, Option]] = {}
    for _ in range(100 * count):
        choice = random_choice(options, draw)
        names = tuple(option.name for option in choice.values())
        if any(names):
            drawn.setdefault(names, choice)
        if len(drawn) == count:
            break
    return list(drawn.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=24, help="random mixes")
    parser.add_argument("--kinds", default="latent,pool,uneven,window", help="variants to mix")
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--calibration", action="append", default=[], help="text; the built-in one when left out")
    parser.add_argument("--context", type=int, help="tokens at which caches are compared")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    asked = SurveyOptions.parse({
        "tokens": args.tokens, "calibration_tokens": args.calibration_tokens, "calibration": args.calibration,
        "context": args.context,
    })  # fmt: skip
    opened, draw = open_model(args.model), random.Random(0)
    kinds = args.kinds.split(",")
    predicted, measured, rows = [], [], [["cache", "predicted", "measured"]]
    with survey(opened, asked, resolve_device(args.device), keep=lambda options: options.only(kinds)) as prepared:
        options = prepared.options
        for choice in different_choices(options, draw, args.count):
            predicted.append(prepared.predictor.loss(choice))
            measured.append(prepared.meter.measure(choice).loss)
            share = options.total(choice) / options.whole
            rows.append([f"{share:.1%}", f"{predicted[-1]:.4f}", f"{measured[-1]:.4f}"])
    echo(headline(machine(prepared.mix.device)))
    print_columns(rows)
    echo(f"Spearman over {args.count} random mixes of {args.kinds}: {rank_correlation(predicted, measured):.3f}")


if __name__ == "__main__":
    main()
