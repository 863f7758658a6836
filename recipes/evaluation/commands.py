"""The command ``rehead evaluate``: flags in, one function called, a summary printed."""

from __future__ import annotations

import json
from typing import Any

import click

from rehead.convert.commands import JSON, QUIET, progress_bar


@click.command("evaluate")
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="What MODEL was made from; divergence is measured from it.")
@click.option("--control", metavar="MODEL", help="The baseline uptrained on the same tokens.")
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    help="Text file (.txt, .md, .rst, also .gz; .jsonl, .parquet), folder or Hub dataset; repeat for more.",
)
@click.option("--tokens", default="32768", show_default=True, metavar="N", help="The first N tokens of each text.")
@click.option("--window", default="512", show_default=True, metavar="N", help="Tokens that the model sees at once.")
@click.option("--stride", metavar="N", help="Of the strided convention.  [default: half a window]")
@click.option(
    "--convention",
    "conventions",
    multiple=True,
    metavar="NAME",
    help="disjoint, strided, or rolling as the harness has it; repeat.  [default: disjoint, strided]",
)
@click.option("--damage", is_flag=True, help="Each layer of MODEL alone in the baseline.")
@click.option("--damage-tokens", metavar="N", help="On so many tokens of the first text.  [default: 2048]")
@click.option("--needle", metavar="LENGTHS", help="Retrieval at these context lengths, e.g. 512,2048.")
@click.option("--needle-depths", metavar="SHARES", help="From 0 to 1.  [default: 0,0.25,0.5,0.75,1]")
@click.option("--needle-trials", metavar="N", help="At each length and depth.  [default: 8]")
@click.option("--tasks", metavar="NAMES", help="lm-evaluation-harness tasks: arc_easy,piqa (extra: rehead[tasks]).")
@click.option("--tasks-dir", metavar="DIR", help="Task files of your own, which need no network.")
@click.option("--task-limit", metavar="N", help="Samples of each task.")
@click.option("--shots", type=int, metavar="N", help="Examples before each question.  [default: the task's own]")
@click.option("--speed", is_flag=True, help="Prefill and decoding, tokens a second.")
@click.option("--speed-batch", metavar="SIZES", default="1,8", show_default=True)
@click.option("--speed-context", metavar="SIZES", default="512,2048", show_default=True)
@click.option("--speed-repeats", metavar="N", help="Of which medians are taken.  [default: 5]")
@click.option(
    "--fail-above",
    multiple=True,
    metavar="NAME=LIMIT",
    help="Exit with 5 where a figure is above, e.g. kl=0.5 or perplexity-ratio=1.2; repeat.",
)
@click.option("--fail-below", multiple=True, metavar="NAME=LIMIT", help="The same for one below: top1-agreement=0.9.")
@click.option("--out", metavar="DIR", help="Write evaluation.json and the report there.")
@click.option("--batch-tokens", metavar="N", help="Tokens in a forward pass.  [default: by the device]")
@click.option("--attention", metavar="NAME", help="sdpa, eager, ... or tiled for Rehead's.  [default: the model's own]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own elsewhere.",
)
@click.option("--resamples", metavar="N", help="Of the bootstrap behind the intervals.  [default: 2000]")
@click.option("--seed", type=int, default=0, show_default=True)
@QUIET
@JSON
def evaluate_command(
    model: str,
    baseline: str | None,
    control: str | None,
    data: tuple[str, ...],
    out: str | None,
    fail_above: tuple[str, ...],
    fail_below: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL (a folder or Hub id) beside the BASELINE that it was made from.

    Perplexity under named conventions with intervals, divergence from the baseline's predictions, KV-cache bytes a
    token; damage by layer, retrieval, tasks and speed when asked for.
    """
    from rehead.recipes.evaluation.gates import enforce, parse_gates
    from rehead.recipes.evaluation.output import check_folder, write

    limits = {
        "fail_above": parse_gates(fail_above, "--fail-above"),
        "fail_below": parse_gates(fail_below, "--fail-below"),
    }
    if out is not None:
        check_folder(out)
    from rehead.recipes.evaluation.run import evaluate

    given = {name: value for name, value in options.items() if value not in (None, ())}
    with progress_bar(quiet) as progress:
        found = evaluate(model, baseline=baseline, control=control, data=data, progress=progress, **{**given, **limits})
    report = write(found, out) if out is not None else None
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    elif not quiet:
        from rehead.recipes.evaluation.summary import show

        show(found, report)
    enforce(found, report or "")
