"""How well a budget's predictions order what is measured: random mixes of every layer's options.

    python -m rehead.benchmarks.budget MODEL [--count 24] [--kinds latent,pool] [--tokens 8192] [--context N]

Predictions are of closed forms, from one backward pass (:mod:`rehead.convert.budget.prepare`); the measure is the KL of
the mix on running text plus that on copying. Prints both of every mix, and Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.convert.budget.options import SurveyOptions
from rehead.convert.budget.survey import survey
from rehead.models.live import resolve_device
from rehead.models.model import open_model


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, of values that all differ."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


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
        for _ in range(args.count):
            choice = {layer: draw.choice(each) for layer, each in options.layers.items()}
            predicted.append(prepared.predictor.loss(choice))
            measured.append(prepared.meter.measure(choice).loss)
            share = options.total(choice) / options.whole
            rows.append([f"{share:.1%}", f"{predicted[-1]:.4f}", f"{measured[-1]:.4f}"])
    echo(headline(machine(prepared.mix.device)))
    print_columns(rows)
    echo(f"Spearman over {args.count} random mixes of {args.kinds}: {rank_correlation(predicted, measured):.3f}")


if __name__ == "__main__":
    main()
