"""The command uptrain: flags made from the options, one function called, facts printed."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from rehead.console import (
    DRY_RUN,
    JSON,
    OVERWRITE,
    QUIET,
    ProgressBar,
    print_estimate,
    print_facts,
    print_json,
    progress_bar,
)
from rehead.flags import flags, set_by_user
from rehead.recipes.training.options import UptrainOptions

# How a run was started or watched is no part of what it made.
_UNRECORDED = re.compile(r"(^| )(--overwrite|--quiet|-q|--json|--resume[ =]\w+|--push-to-hub[ =]\S+)(?= |$)")


@click.command("uptrain")
@click.argument("student")
@click.argument("out")
@flags(UptrainOptions)
@click.option("--resume", default="auto", show_default=True, metavar="auto|never",
              help="auto: resume an interrupted run from its newest checkpoint; never: start again.")  # fmt: skip
@OVERWRITE
@DRY_RUN
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this Hub repository.  [default: no upload]")
@QUIET
@JSON
def uptrain_command(
    student: str,
    out: str,
    as_json: bool,
    quiet: bool,
    resume: str,
    overwrite: bool,
    dry_run: bool,
    push_to_hub: str | None,
    **values: Any,
) -> None:
    """Train STUDENT (a folder or Hub id) briefly, taught by the model it was converted from, and write it to OUT.

    Several GPUs: accelerate launch --config_file fsdp2.yaml -m rehead.cli uptrain ...
    """
    if dry_run:
        from rehead.recipes.training.dry_run import estimate_uptraining

        estimate = estimate_uptraining(student, out, resume=resume, overwrite=overwrite, **set_by_user(values))
        print_estimate(f"would uptrain {student}", estimate, as_json)
        return
    from rehead.recipes.training.run import uptrain

    line = _UNRECORDED.sub("", shlex.join(["rehead", *sys.argv[1:]]))
    with training_bar(quiet) as (progress, on_event):
        done = uptrain(
            student,
            out,
            resume=resume,
            overwrite=overwrite,
            command=line,
            progress=progress,
            on_event=on_event,
            **set_by_user(values),
        )
    if int(os.environ.get("RANK", "0")):
        return
    facts = done.as_json()
    if push_to_hub is not None:
        from rehead.checkpoints.push import push_folder

        facts["pushed"] = push_folder(out, push_to_hub, message="Upload a checkpoint uptrained with Rehead")
    if as_json:
        print_json(facts)
    elif not quiet:
        _summary(out, facts)


@contextmanager
def training_bar(quiet: bool) -> Iterator[tuple[ProgressBar | None, Any]]:
    """A progress callback and an event listener that show loss, tokens per second and time left on standard error."""
    with progress_bar(quiet) as progress:
        if progress is None:
            yield None, _ignore
            return

        def tell(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                progress.figures = _figures(event)
            elif line := _line(event):
                progress.line(line)

        yield progress, tell


def _ignore(event: dict[str, Any]) -> None:
    """Listens, so that warnings stay in the log."""


def _figures(event: dict[str, Any]) -> str:
    return f"loss {event['loss']:.4g}  {event['tokens_per_second']:,.0f} tokens/s"


def _line(event: dict[str, Any]) -> str | None:
    kind = event["event"]
    if kind == "evaluation":
        shown = [f"{name} {event[name]:.4g}" for name in ("kl", "top1_agreement", "perplexity") if name in event]
        return f"step {event['step']}, {event['data']}: {', '.join(shown)}"
    if kind in ("note", "warning"):
        return f"{kind}: {event['note']}"
    if kind == "resume":
        return f"resuming from the checkpoint of step {event['step']}"
    return None


def _summary(out: str, facts: dict[str, Any]) -> None:
    rows = [
        ("steps", f"{facts['steps']:,} of {facts['batch_tokens']:,} tokens: {facts['tokens']:,}"),
        ("time", f"{facts['seconds']:.1f} s, {facts['tokens'] / max(facts['seconds'], 1e-9):,.0f} tokens/s"),
        ("peak memory", f"{facts['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]
    rows += [("teacher", facts["teacher"])] if facts["teacher"] else []
    near = "" if facts["kl_at_start"] is None else f", as the student started at KL {facts['kl_at_start']:.4g}"
    rows += [("learning rate", f"{facts['learning_rate']:g}{near}")]
    rows += [("loss", f"{facts['last']['step']['loss']:.4g}")]
    for name, figures in facts["last"].items():
        if name.startswith("evaluation "):
            shown = [f"{key} {figures[key]:.4g}" for key in ("kl", "top1_agreement", "perplexity") if key in figures]
            shown += [f"{key} at the start {value:.4g}" for key, value in figures.get("at_start", {}).items()]
            rows.append((figures["data"].rsplit("/", 1)[-1], ", ".join(shown)))
    rows += [("pushed", facts["pushed"])] if "pushed" in facts else []
    print_facts(f"wrote {out}", rows)
