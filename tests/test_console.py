"""The console: what comes from a file is shown, never obeyed."""

from __future__ import annotations

import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehead import console
from rehead.cli import main
from rehead.console import (
    LogLines,
    amount,
    print_columns,
    print_facts,
    print_json,
    print_wrapped,
    printable,
    progress_bar,
    rich_console,
)

NASTY = "model\x1b[2K\x9b1A\rwrote\u202e\u200b\ud800\x07 ok"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe × 日本 🦙", "größe × 日本 🦙"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\rb\nc\td", r"a\rb\nc\td"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        (5, "5"),
    ],
)
def test_printable(text: object, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_nothing_printed_moves_the_cursor(text: str) -> None:
    assert printable(text).isprintable()
    assert set(printable(text, newlines=True)) - set("\n\t") <= set(printable(text))


def test_every_way_to_print_is_safe(capsys: pytest.CaptureFixture) -> None:
    print_facts(NASTY, [(NASTY, NASTY)])
    print_columns([[NASTY, NASTY]])
    print_wrapped(NASTY, "name  ")
    print_json({NASTY: [NASTY]})
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out[out.index("{") :]) == {NASTY: [NASTY]}


def test_tables_and_titles_are_safe() -> None:
    from rich.table import Table

    console = rich_console(file=io.StringIO(), width=200)
    table = Table(title=NASTY, caption=NASTY)
    table.add_column(NASTY)
    table.add_row(NASTY)
    console.print(table)
    console.print(NASTY, markup=False)
    assert console.file.getvalue().replace("\n", "").isprintable()


def test_errors_are_safe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "no\x1b[2Jwhere", "--json"])
    out, err = capsys.readouterr()
    assert r"no\x1b[2Jwhere" in err
    assert (out + err).replace("\n", "").isprintable()


def test_bars_start_where_a_resumed_run_does_and_show_what_a_file_says_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", screen)
    with progress_bar(quiet=False) as show:
        show.figures = "[red]loss\x1b[2J"
        show("layers", 90, 100)
        show("layers", 91, 100)
        show.line("[bold]a\x1b[2Jb")
    shown = screen.getvalue()
    assert "[red]loss\\x1b[2J" in shown
    assert "[bold]a\\x1b[2Jb" in shown
    assert "\x1b[2J" not in shown
    assert "91%" in shown


def test_warnings_are_lines_too(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    # Without the lone surrogate: pytest keeps what was logged, and its workers cannot send that.
    name = NASTY.replace("\ud800", "")
    logging.getLogger("rehead.anything").warning("layer %s", name)
    assert capsys.readouterr().err == f"warning: layer {printable(name)}\n"


@pytest.mark.parametrize(
    ("stage", "done", "total", "shown"),
    [
        ("calibrating", 3, 30, "3 of 30 layers"),
        ("disjoint, model", 4, 63, "4 of 63 windows"),
        ("writing", 1.2e9, 4.8e9, "1.2 of 4.8 GB"),
        ("hashing", 5e5, 2e6, "0.5 of 2 MB"),
        ("tokenising", 1_234_567, 0, "1,234,567 tokens"),
        ("of one's own", 3, 30, ""),
        ("of one's own", 3, 0, "3"),
    ],
)
def test_amounts_have_units(stage: str, done: float, total: float, shown: str) -> None:
    assert amount(stage, done, total) == shown


def test_the_time_left_is_of_the_pass_that_runs(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that runs twice begins anew: the first pass's hour is no part of the second's pace."""
    clock = iter([0, 0, 1800, 3600, 3600, 3610, 3620])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    lines = LogLines(every=1)
    for done in (0, 15, 30, 0, 3, 30):
        lines("calibrating", done, 30)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "calibrating 50%  15 of 30 layers  30 min left",
        "calibrating 100%  30 of 30 layers",
        "calibrating 10%  3 of 30 layers  2 min left",
        "calibrating 100%  30 of 30 layers",
    ]
