"""What commands print: tables, JSON, progress, and the options that all commands share.

Nothing that comes from a file reaches the terminal as it is: every line goes through :func:`printable`, so that a name
with control characters in it can neither move the cursor nor look like another name.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from rehead.errors import unknown_name

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, float, float], None]
"""What functions take as ``progress``: called with (stage, done, total)."""

JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the facts as JSON on standard output.  [default: off]"
)
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.  [default: off]")
REVISION = click.option(
    "--revision", metavar="R", help="Hub revision: branch, tag or commit.  [default: the main branch]"
)
DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be done, about how long it takes and how much memory, and stop.  [default: off]",
)
OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint at OUT, at the very end.  [default: off]"
)


class LazyGroup(click.Group):
    """A click group that imports a command when it is called, not when it is listed.

    Args:
        table: name -> (module, one line of help).
        load: (module, name) -> the command.
        kind: what a command is called in messages.
    """

    def __init__(
        self, *args: Any, table: Mapping[str, tuple[str, str]], load: Callable[[str, str], click.Command], kind: str,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **settings)
        self._table, self._load, self._kind = table, load, kind

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return without_empty_words(self._load(self._table[name][0], name)) if name in self._table else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self._table and not args[0].startswith("-"):
            ctx.fail(unknown_name(self._kind, args[0], self._table))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(f"{self._kind.capitalize()}s"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


def without_empty_words(command: click.Command) -> click.Command:
    """A command that refuses an empty argument or option by name, as an unset shell variable leaves it."""

    def check(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        words = value if isinstance(value, tuple) else (value,)
        if any(isinstance(word, str) and not word.strip() for word in words):
            ctx.fail(f"{parameter.make_metavar(ctx) if isinstance(parameter, click.Argument) else parameter.opts[0]}: "
                     "is empty; give it a value")  # fmt: skip
        return value

    for part in command.commands.values() if isinstance(command, click.Group) else ():
        without_empty_words(part)
    for parameter in command.params:
        if parameter.callback is None:
            parameter.callback = check
    return command


def printable(text: object, newlines: bool = False) -> str:
    r"""A text that is safe to print: control and other invisible characters become escapes such as ``\x1b``.

    Args:
        text: anything; its ``str``.
        newlines: keep line feeds and tabs, for a text of several lines.
    """
    line = str(text)
    if line.isprintable():
        return line
    kept = "\n\t" if newlines else ""
    return "".join(
        character
        if character.isprintable() or character in kept
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in line
    )


def echo(line: object = "", *, err: bool = False, newlines: bool = False) -> None:
    """Print a line on standard output, or on standard error; see :func:`printable`."""
    click.echo(printable(line, newlines), err=err)


def print_json(facts: Any) -> None:
    """Print JSON for programs; control characters become JSON escapes."""
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(
            character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]
            for character in text
        )
    click.echo(text)


def print_facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title and below it rows of name and text."""
    echo(title)
    width = max((len(printable(name)) for name, _ in rows), default=0)
    for name, text in rows:
        echo(f"  {printable(name).ljust(width)}  {text}")


def print_estimate(title: str, estimate: Any, as_json: bool) -> None:
    """Print what a dry run found (:class:`rehead.recipes.estimate.Estimate`)."""
    if as_json:
        print_json(estimate.as_json())
    else:
        print_facts(title, estimate.rows())


def print_columns(rows: Sequence[Sequence[object]]) -> None:
    """Print rows, each with the same number of cells, in aligned columns."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)][:-1]
    for row in cells:
        echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip())


def print_wrapped(text: str, lead: str = "") -> None:
    """Print a sentence over as many lines as the terminal needs, indented under ``lead``."""
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 110), 40)
    indent = " " * len(lead)
    text = textwrap.fill(printable(text), width, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
    echo(text, newlines=True)


def rich_console(*, err: bool = False, **settings: Any) -> Console:
    """A rich console for tables and bars, which makes every text :func:`printable`."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text, newlines=True), **how)

    return PlainConsole(stderr=err, highlight=False, **settings)


class ProgressBar(Protocol):
    """Shows how far work is: called with (stage, done, total)."""

    figures: str
    """Shown beside the stage, for example a loss."""

    def __call__(self, stage: str, done: float, total: float) -> None: ...

    def line(self, text: str) -> None:
        """Print a line on standard error, above any bar."""


@contextmanager
def progress_bar(quiet: bool) -> Iterator[ProgressBar | None]:
    """Progress on standard error: bars on a terminal, a line now and then in a log; None when quiet."""
    if quiet or not sys.stderr.isatty():
        yield None if quiet else LogLines()
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description:<12}", markup=False),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[amount]}", markup=False),
        rich.TextColumn("{task.fields[figures]}", markup=False),
        rich.TimeRemainingColumn(),
    )
    # The time left is from the pace of ten minutes: a layer of a large model may take one.
    with rich.Progress(*columns, console=rich_console(err=True), speed_estimate_period=600) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Any) -> None:
        self.figures = ""
        self._bars, self._tasks = bars, dict[str, Any]()
        self._done: dict[str, float] = {}

    def __call__(self, stage: str, done: float, total: float) -> None:
        shown = {"total": total or None, "amount": amount(stage, done, total), "figures": printable(self.figures)}
        if stage not in self._tasks:
            # A resumed run starts its bar where the earlier run stopped; that work does not count in its speed.
            self._tasks[stage] = self._bars.add_task(printable(stage), completed=done, **shown)
        elif done < self._done[stage]:  # a second pass has a pace of its own
            self._bars.reset(self._tasks[stage], completed=done, **shown)
        self._done[stage] = done
        self._bars.update(self._tasks[stage], completed=done, **shown)

    def line(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False)


class LogLines:
    """Progress where nobody watches a bar: a line on standard error every so often.

    Args:
        every: seconds between lines, so that short work leaves none.
    """

    def __init__(self, every: float = 30.0) -> None:
        self.figures = ""
        self._every, self._told = every, time.monotonic()
        self._started: dict[str, tuple[float, float]] = {}
        self._done: dict[str, float] = {}

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if done < self._done.get(stage, done):  # a second pass has a pace of its own
            del self._started[stage]
        self._done[stage] = done
        since, first = self._started.setdefault(stage, (now, done))
        if now - self._told < self._every:
            return
        self._told = now
        parts = [f"{stage} {done / total:.0%}" if total else stage, amount(stage, done, total), self.figures]
        if total and first < done < total:
            parts.append(f"{duration((now - since) * (total - done) / (done - first))} left")
        self.line("  ".join(filter(None, parts)))

    def line(self, text: str) -> None:
        echo(text, err=True)


#: What stages count, by the first words of their names.
_UNITS = {
    "calibrating": "layers", "running": "layers", "ranking layers": "layers", "training": "steps",
    "tokenising": "tokens", "writing": "bytes", "hashing": "bytes", "loading": "models", "divergence": "windows",
    "disjoint": "windows", "strided": "windows", "rolling": "windows", "damage": "windows", "needle": "prompts",
    "speed": "sizes", "samples": "models", "joint fit": "windows of layers",
}  # fmt: skip


def amount(stage: str, done: float, total: float) -> str:
    """How far a stage is, in what it counts: ``"3 of 30 layers"``, ``"1.2 of 4.8 GB"``; empty for an unknown one."""
    unit = _UNITS.get(stage.partition(",")[0], "")
    if unit == "bytes":
        size, unit = next(
            pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if pair[0] <= max(total, 1)
        )
        return f"{done / size:,.3g} of {total / size:,.3g} {unit}" if total else f"{done / size:,.3g} {unit}"
    if not unit:
        return "" if total else f"{done:,.0f}"
    return f"{done:,.0f} of {total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``"0.4 s"``, ``"45 s"``, ``"12 min"``, ``"2.5 h"``."""
    if seconds < 9.5:
        return f"{seconds:.1g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


def print_warnings() -> None:
    """Print Rehead's log records on standard error. Commands call this; a library's caller sets up its own logging."""
    logger = logging.getLogger("rehead")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings())


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; errors still raise."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
