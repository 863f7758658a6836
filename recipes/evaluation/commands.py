"""The command ``rehead evaluate``: flags in, one function called, a summary printed."""

from __future__ import annotations

from typing import Any

import click

from rehead.console import DRY_RUN, JSON, QUIET, REVISION, echo, print_estimate, print_json, progress_bar
from rehead.flags import flags, set_by_user
from rehead.recipes.evaluation.options import EvaluateOptions


@click.command("evaluate")
@click.argument("model")
@click.option(
    "--baseline",
    metavar="MODEL",
    help="What MODEL was made from; divergence is measured from it.  [default: none; MODEL itself with --patch]",
)
@click.option("--control", metavar="MODEL", help="The baseline uptrained on the same tokens.  [default: none]")
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    help="Text file (.txt, .md, .rst, also .gz; .jsonl, .parquet), folder or Hub dataset; repeat for more."
    "  [default: built-in:heldout]",
)
@flags(EvaluateOptions)
@click.option("--out", metavar="DIR", help="Write evaluation.json and the report there.  [default: nothing is written]")
@click.option(
    "--push-to-hub",
    metavar="REPO",
    help="Add evaluation.json and the report to this Hub repository, below evaluation/.  [default: no upload]",
)
@DRY_RUN
@REVISION
@QUIET
@JSON
def evaluate_command(
    model: str,
    revision: str | None,
    baseline: str | None,
    control: str | None,
    data: tuple[str, ...],
    out: str | None,
    push_to_hub: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure MODEL (a folder or Hub id) beside the BASELINE that it was made from.

    Perplexity under named conventions with intervals, divergence from the baseline's predictions, the KV cache's size;
    damage by layer, retrieval, tasks and speed when asked for. With --patch, MODEL is measured beside itself.
    """
    options = EvaluateOptions.parse(set_by_user(values))
    if dry_run:
        from rehead.recipes.evaluation.dry_run import estimate_evaluation, require_no_output

        require_no_output(out, push_to_hub)
        named: Any = {"revision": revision, "baseline": baseline, "control": control, "data": data}
        print_estimate(f"would evaluate {model}", estimate_evaluation(model, **named, **dict(options)), as_json)
        return
    from rehead.recipes.evaluation.gates import enforce
    from rehead.recipes.evaluation.output import check_folder, push, write

    if out is not None:
        check_folder(out)
    from rehead.recipes.evaluation.run import evaluate

    with progress_bar(quiet) as progress:
        evaluation = evaluate(
            model, revision=revision, baseline=baseline, control=control, data=data, progress=progress, **dict(options)
        )
    report = write(evaluation, out) if out is not None else None
    pushed = push(evaluation, push_to_hub) if push_to_hub is not None else None
    if as_json:
        print_json(evaluation.as_json())
    elif not quiet:
        from rehead.recipes.evaluation.summary import show

        show(evaluation, report)
        if pushed is not None:
            echo(f"pushed: {pushed}")
    enforce(evaluation, report or "")
