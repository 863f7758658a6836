"""The command ``rehead curve``: flags in, one function called, a table printed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from rehead.console import JSON, QUIET, REVISION, echo, print_columns, print_facts, print_json, progress_bar
from rehead.convert.budget.options import CurveOptions
from rehead.flags import flags, set_by_user

if TYPE_CHECKING:
    from rehead.convert.budget.meet import Met


@click.command("curve")
@click.argument("model")
@flags(CurveOptions)
@click.option("--device", default="auto", show_default=True, help="Where it runs: auto, cpu, cuda, ...")
@REVISION
@QUIET
@JSON
def curve_command(model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Show what every size of the KV cache would cost MODEL (a folder or Hub id), before anything is trained.

    For each budget the best form of every layer: KV heads, latents, windows. Losses are nats per token, those of
    closed forms, which recovery lowers; "predicted" is for text and copying together.
    """
    from rehead.convert.budget.curve import curve, summary

    with progress_bar(quiet) as progress:
        result = curve(model, progress=progress, **set_by_user(values))
    if as_json:
        print_json(result.as_json())
        return
    echo(f"{result.model}: {result.bytes:,} bytes of cache at {result.context:,} tokens")
    count = result.facts["layer_count"]
    rows: list[list[object]] = [["cache", "predicted", "KL", "copied", "read per token", "layers"]]
    for point in result.points:
        said = point.name if point.name != "mix" else summary(point.layers, count)
        rows.append([
            f"{point.share:.1%}",
            f"{point.predicted:.3f}",
            "-" if point.kl is None else f"{point.kl:.3f}",
            "-" if point.recalled is None else f"{point.recalled:.0%}",
            f"{point.attention_flops / 1e6:,.0f}M",
            said if point.name == "mix" else f"all: {said}",
        ])  # fmt: skip
    print_columns(rows)
    for name, reason in result.blocked.items():
        echo(f"not offered: {name}: {reason}")


def print_met(met: Met, out: str) -> None:
    """Print what a budget made of a model: the form of each layer, why, and the verdict."""
    from rehead.convert.budget.meet import verdict

    facts, selection = met.facts, met.selection
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    by_option: dict[str, list[int]] = {}
    for layer, option in selection.choice.items():
        by_option.setdefault(option.name, []).append(layer)
    kept = [layer for layer in met.conversion.plan.source.layers if layer not in selection.choice]
    rows = [("KV cache", f"{before:,} -> {after:,} bytes at {facts['context']:,} tokens ({met.share:.1%})")]
    rows += [(name, f"layers {spans(layers)}") for name, layers in by_option.items()]
    rows += [("as they were", f"layers {spans(kept)}")] if kept else []
    rows.append(("chosen by", selection.origin))
    losses = selection.measured
    rows.append(("closed form", f"KL {losses.kl:.4f}, and {losses.recall_kl:.4f} where it copies from afar"))
    for rival in selection.rivals[:3]:
        rows.append(("instead of", f"{rival.name}: {rival.measured.kl:.4f} and {rival.measured.recall_kl:.4f}"))
    for kind, count in Counter(facts["not_offered"].values()).most_common(2):
        rows.append(("not offered", f"{count} options: {kind}"))
    rows += [("time", f"{met.conversion.seconds:.1f} s"), ("verdict", verdict(met.measured))]
    print_facts(f"wrote {out}", rows)


def spans(layers: list[int]) -> str:
    """Layer indices as ``--layers`` takes them: ``0,2-5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ",".join("-".join(map(str, part)) for part in parts)
