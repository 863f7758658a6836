"""The command ``rehead curve``: flags in, one function called, a table printed and a page written."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from rehead.console import DRY_RUN, JSON, QUIET, REVISION, echo, print_columns, print_estimate, print_json, progress_bar
from rehead.convert.budget.options import CurveOptions
from rehead.flags import flags, set_by_user


@click.command("curve")
@click.argument("model")
@flags(CurveOptions)
@click.option("--out", metavar="DIR", help="Write a page, its plot and JSON there too.  [default: print only]")
@click.option("--device", default="auto", show_default=True, help="Where it runs: auto, cpu, cuda, ...")
@DRY_RUN
@REVISION
@QUIET
@JSON
def curve_command(model: str, out: str | None, dry_run: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Show what every size of the KV cache would cost MODEL (a folder or Hub id), before anything is trained.

    For each budget the best form of every layer: KV heads, latents, windows. Losses are nats per token, those of
    closed forms, which recovery lowers; "predicted" is for text and copying together.
    """
    if dry_run:
        from rehead.recipes.curve.dry_run import estimate_curve

        print_estimate(f"{model}: a curve", estimate_curve(model, **set_by_user(values)), as_json)
        return
    from rehead.convert.budget.curve import curve, summary

    with progress_bar(quiet) as progress:
        result = curve(model, progress=progress, **set_by_user(values))
    written = []
    if out is not None:
        from rehead.recipes.curve.page import write_curve

        written = write_curve(result, out, shlex.join(["rehead", *sys.argv[1:]]))
    if as_json:
        print_json(result.as_json())
        return
    echo(f"{result.model}: {result.bytes:,} bytes of cache at {result.context:,} tokens")
    count = result.facts["layer_count"]
    decoding = result.facts.get("decoding")
    times = [] if decoding is None else ["attention"]
    rows: list[list[object]] = [["cache", "predicted", "measured", "KL", "copied", "read per token", *times, "layers"]]
    for point in result.points:
        said = point.name if point.name != "mix" else summary(point.layers, count)
        rows.append([
            f"{point.share:.1%}",
            f"{point.predicted:.3f}",
            "-" if point.loss is None else f"{point.loss:.3f}",
            "-" if point.kl is None else f"{point.kl:.3f}",
            "-" if point.recalled is None else f"{point.recalled:.0%}",
            f"{point.attention_flops / 1e6:,.0f}M",
            *([] if point.decode_seconds is None else [f"{point.decode_seconds * 1e3:.3g} ms"]),
            said if point.name == "mix" else f"all: {said}",
        ])  # fmt: skip
    print_columns(rows)
    if decoding is not None:
        echo(
            f"attention in one step of decoding {decoding['batch']} x {result.context:,} tokens on "
            f"{result.facts['device']}: {decoding['original_seconds'] * 1e3:.3g} ms with the whole cache"
        )
    for sentence in result.comparisons():
        echo(sentence)
    for name, reason in result.blocked.items():
        echo(f"not offered: {name}: {reason}")
    for path in written:
        echo(f"wrote {path}")
