"""The command line: reads flags, calls one function, prints.

Commands live beside what they run (``convert/commands.py``, ``patches/commands.py``, ``recipes/commands.py``) and are
loaded only when they are called, so that ``rehead --help`` starts fast and never imports torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib import import_module
from typing import Never

import click

from rehead.console import LazyGroup, echo, print_json, print_warnings
from rehead.errors import EXIT_INTERRUPTED, EXIT_USAGE, as_error, forget_outputs, outputs_written
from rehead.version import __version__

# command -> (module that defines it, one-line help). The help stands here so that listing commands imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": (
        "rehead.convert.commands",
        "Show a model's attention layout, KV bytes per token, what can be done.",
    ),
    "plan": ("rehead.convert.commands", "Show exactly what a conversion would change; reads no weights."),
    "convert": ("rehead.convert.commands", "Convert a checkpoint to fewer KV heads."),
    "curve": ("rehead.recipes.curve.commands", "Show what every size of the KV cache would cost a model."),
    "verify": ("rehead.convert.commands", "Check a converted checkpoint: files, loading, logits."),
    "families": ("rehead.convert.commands", "List every supported architecture with its layout."),
    "variants": ("rehead.convert.commands", "List every variant of attention and blocks, live and saved."),
    "evaluate": ("rehead.recipes.evaluation.commands", "Measure a model beside the one that it was made from."),
    "run": ("rehead.recipes.commands", "Run a recipe: convert, uptrain, evaluate, report."),
    "recipes": ("rehead.recipes.commands", "List, show, copy and check recipes."),
    "uptrain": ("rehead.recipes.training.commands", "Win back what a conversion lost, by a short training."),
    "patches": ("rehead.patches.commands", "List the patches; --coverage proves them on every architecture."),
    "bench": ("rehead.patches.commands", "Measure attention, decoding and blocks beside their peers."),
}

# What Ctrl-C leaves of a command, where it may leave anything.
LEAVES: dict[str, str] = {
    "convert": "; nothing was written to OUT",
    "evaluate": "; nothing was written to --out",
    "run": "; finished stages are kept, the same command continues after them",
    "uptrain": "; nothing was written to OUT, the same command resumes from the newest checkpoint if there is one",
}


def _load(module: str, name: str) -> click.Command:
    return getattr(import_module(module), name.replace("-", "_") + "_command")


@click.group(
    cls=LazyGroup, table=COMMANDS, load=_load, kind="command", invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
@click.version_option(__version__, prog_name="rehead")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Give pretrained transformers new attention: convert, patch, uptrain, evaluate."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: list[str] | None = None) -> None:
    """Run the CLI and exit with Rehead's codes; a user's mistake never shows a traceback.

    Exit codes: 0 done, 2 usage or recipe, 3 unsupported or unsafe input, 4 verification failed, 5 a quality gate
    failed, 130 interrupted, 143 terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Nothing is phoned home from a conversion tool.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # A terminal or a log that has no sign for "×" gets a question mark, not a traceback after the work is done.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    print_warnings()
    forget_outputs()
    try:
        cli.main(args=argv, prog_name="rehead", standalone_mode=False)
    except click.exceptions.Exit as stop:
        _leave(stop.exit_code)
    except click.ClickException as mistake:
        _fail(mistake.format_message(), EXIT_USAGE, "--json" in argv)
    except (KeyboardInterrupt, click.Abort):
        command, written = argv[0] if argv else "", outputs_written()
        # A recipe keeps whatever its stages wrote, and says so.
        left = f"; {', '.join(written)} was written" if written and command != "run" else LEAVES.get(command, "")
        _fail(f"interrupted{left}", EXIT_INTERRUPTED, "--json" in argv)
    except Exception as broken:
        error = as_error(broken)
        if error is None:
            raise
        _fail(str(error), error.exit_code, "--json" in argv)
    _leave(0)


def _fail(message: str, code: int, as_json: bool) -> None:
    """Print one error line (and the same fact as JSON on stdout when asked) and exit.

    Of several processes of one run, the first that failed does so for all.
    """
    line = " ".join(message.split())
    ranks = sys.modules.get("rehead.models.ranks")
    if not (ranks.speaks(code) if ranks is not None else os.environ.get("RANK", "0") == "0"):
        _leave(code)
    with contextlib.suppress(OSError):
        echo(f"error: {line}", err=True)
    if as_json:
        try:
            print_json({"error": line, "exit_code": code})
        except OSError:
            # Nobody reads any more; what is still buffered must not be tried again when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(code)


def _leave(code: int) -> Never:
    """Exit; one of several processes leaves the interpreter up, whose end their threads do not always survive."""
    ranks = sys.modules.get("rehead.models.ranks")
    if ranks is not None and ranks.joined():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
