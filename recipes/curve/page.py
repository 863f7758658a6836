"""The curve of quality against cache as a page that a person decides from: its plot, its table, its figures as JSON."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.convert.budget.curve import Curve, Point, summary
from rehead.models.distance import USABLE
from rehead.recipes.report.cache_plot import CacheRow, cache_plot
from rehead.recipes.report.drawing import Plot
from rehead.recipes.report.html import html, standalone
from rehead.recipes.report.tables import Table
from rehead.recipes.report.wording import bytes_of, count, figure, percent

#: Files that :func:`write_curve` writes.
PAGE, PLOT, FIGURES = "curve.html", "curve.svg", "curve.json"
CHOSEN = "chosen layer by layer"
_NAMES = {"pool": "KV heads, all layers", "uneven": "uneven groups, all layers"}


def write_curve(curve: Curve, folder: str | os.PathLike[str], command: str = "") -> list[Path]:
    """Write a curve as a page, a plot and JSON into a folder, which is made where there is none.

    Args:
        command: what made the curve, for the page.

    Returns:
        The files.

    Raises:
        ResourceError: the disk is full or fails.
    """
    plot = curve_plot(curve)
    texts = {PAGE: curve_page(curve, plot, command), FIGURES: json.dumps(curve.as_json(), indent=2) + "\n"}
    if plot is not None:
        texts[PLOT] = standalone(plot)
    for name, text in texts.items():
        write_file(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def curve_plot(curve: Curve) -> Plot | None:
    """Loss against bytes of cache: choices at each size, predicted and measured, and each form in all layers."""
    rows = []
    for point in curve.points:
        mixed = point.name == "mix"
        if mixed:
            rows.append(CacheRow(f"{CHOSEN}, predicted", point.bytes, point.predicted))
        if mixed and point.loss is not None:
            rows.append(CacheRow(f"{CHOSEN}, measured", point.bytes, point.loss))
        if not mixed:
            loss = point.predicted if point.loss is None else point.loss
            rows.append(CacheRow(_series(point.name), point.bytes, loss))
    return cache_plot(
        rows, curve.context, curve.bytes, title="What every size of the cache costs", label="loss, nats per token",
        caption="KL divergence from the original on running text plus that on copying from afar, in closed form: "
        "recovery, which converting does by default, lowers it. One form in all layers is as predicted where it was "
        "not measured. Lower left is better; the original lies at 0.",
    )  # fmt: skip


def _series(name: str) -> str:
    """What a choice of one option for all layers is called: its variant, and of latents and windows their kind."""
    kind, _, told = name.partition(":")
    options = dict(part.split("=", 1) for part in told.split(",") if "=" in part)
    if kind == "latent":
        return f"latents, rotated key of {options.get('rope_dims', '?')}, all layers"
    if kind == "window":
        return f"windows with {'first tokens' if 'sinks' in options else 'sink logits'}, all layers"
    return _NAMES.get(kind, f"{kind}, all layers")


def curve_page(curve: Curve, plot: Plot | None, command: str = "") -> str:
    """The page: what to run for each size, the plot, every point, and what each choice gives each layer."""
    facts = curve.facts
    text = facts["calibration"]
    texts = ", ".join(f"{count(tokens)} predictions of {name}" for name, tokens in facts["measured_on"].items())
    conditions = Table("conditions", "Conditions", [], [
        ["model", curve.model],
        ["cache", f"{bytes_of(curve.bytes)} at {count(curve.context)} tokens"],
        ["calibrated on", f"{count(text['tokens'])} tokens of {', '.join(text['text'])}"],
        ["measured on", texts],
        ["device", facts["device"]],
        *([["attention per step", _decoding(facts["decoding"])]] if "decoding" in facts else []),
        *([["command", command]] if command else []),
    ])  # fmt: skip
    return html(
        title=f"{curve.model}: quality against cache",
        verdict={"headline": headline(curve), "points": advice(curve)},
        failed=False,
        notes=curve.comparisons(),
        overview=_table(curve),
        samples=[],
        samples_note="",
        plots=[plot] if plot is not None else [],
        conditions=conditions,
        caveats=[f"Not offered: {name}: {reason}." for name, reason in curve.blocked.items()],
        details=[("Layers of each choice", [_layers(point) for point in _mixes(curve)])],
        files=f"{FIGURES}, {PLOT}",
    )


def headline(curve: Curve) -> str:
    """The smallest cache that is usable as measured, in a sentence."""
    usable = [point for point in _mixes(curve) if point.kl is not None and point.kl <= USABLE[0]]
    if not usable:
        return "No size that was measured is usable in closed form; recovery and uptraining lower what is shown here."
    best = min(usable, key=lambda point: point.bytes)
    if best.recalled is not None:
        copied = f" and copies {percent(best.recalled, 0)} of what the original copies"
    else:  # a model that does not copy has no share to keep
        copied = "" if best.recall_kl is None else f" on text and {figure(best.recall_kl)} where text repeats itself"
    return (
        f"With {percent(best.share, 0)} of its cache the model loses {figure(best.kl)} nats per token{copied}, before "
        "any recovery."
    )


def advice(curve: Curve) -> list[tuple[str, str]]:
    """(size, what it costs and the command for it) of every choice that was measured."""
    said = []
    for point in _mixes(curve):
        if point.kl is not None:
            share = f"{point.budget or point.share:.0%}"
            line = shlex.join(["rehead", "convert", curve.model, "OUT", "--kv-cache", share])
            said.append((share, f"{figure(point.loss)} nats, of them {figure(point.kl)} on text: {line}"))
    return said


def _mixes(curve: Curve) -> list[Point]:
    return [point for point in curve.points if point.name == "mix"]


def _table(curve: Curve) -> Table:
    decoding = curve.facts.get("decoding")
    head = ["choice", f"KV at {count(curve.context)} tokens", "share", "predicted", "measured", "KL on text", "copied",
            "MFLOP per token", *([] if decoding is None else ["ms of attention per step"])]  # fmt: skip
    layers = curve.facts["layer_count"]
    rows = [
        [
            f"{CHOSEN}: {summary(point.layers, layers)}" if point.name == "mix" else f"{point.name}, all layers",
            bytes_of(point.bytes), percent(point.share), figure(point.predicted), figure(point.loss), figure(point.kl),
            percent(point.recalled, 0), figure(point.attention_flops / 1e6),
            *([] if point.decode_seconds is None else [figure(point.decode_seconds * 1e3)]),
        ]
        for point in curve.points
    ]  # fmt: skip
    return Table("overview", "Every size and form", head, rows,
                 "Predicted and measured: nats per token, text and copying together, in closed form.")  # fmt: skip


def _decoding(decoding: dict[str, Any]) -> str:
    """Of which step the times are, and the original's."""
    return f"{decoding['batch']} sequences, {figure(decoding['original_seconds'] * 1e3)} ms with the whole cache"


def _layers(point: Point) -> Table:
    rows: list[list[Any]] = [[str(layer), option] for layer, option in sorted(point.layers.items())]
    return Table(f"layers-{point.bytes}", f"{percent(point.share)} of the cache", ["layer", "form"], rows)
