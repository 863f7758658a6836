"""The commands run and recipes: flags in, one function called, the verdict printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from rehead.console import JSON, QUIET, echo, print_columns, print_json, print_wrapped, progress_bar

if TYPE_CHECKING:
    from rehead.recipes.pipeline.run import Planned, RecipeRun

SETTINGS = click.option(
    "--set", "settings", multiple=True, metavar="A.B=VALUE",
    help="Change a key of the recipe, e.g. --set uptrain.tokens=2M; repeat for more.  [default: none]",
)  # fmt: skip
_EVENTS = {"run": "running", "done": "done", "skip": "kept", "wait": "waiting", "fail": "failed"}


@click.command("run")
@click.argument("recipe")
@SETTINGS
@click.option("--out", metavar="DIR", help="Where everything goes.  [default: as the recipe says]")
@click.option("--cell", type=int, metavar="K", help="Run one cell of the recipe's sweep.  [default: all]")
@click.option("--gather", is_flag=True, help="Run nothing; report on the cells that have been run.  [default: off]")
@click.option("--list-cells", is_flag=True, help="List the cells with the command of each, and stop.  [default: off]")
@click.option(
    "--plan", "only_plan", is_flag=True, help="Show the stages and which of them would run, and stop.  [default: off]"
)
@QUIET
@JSON
def run_command(
    recipe: str,
    settings: tuple[str, ...],
    out: str | None,
    cell: int | None,
    gather: bool,
    list_cells: bool,
    only_plan: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run RECIPE (a file, or one of `rehead recipes ls`): convert, uptrain, evaluate, report.

    A stage whose output is there and verifies is skipped, so running again resumes where the last run stopped.
    """
    from rehead.recipes.pipeline.run import cells_table, plan_recipe, run_recipe

    if list_cells or only_plan:
        planned = plan_recipe(recipe, settings, out)
        if list_cells:
            _show_cells(cells_table(planned, settings), as_json)
        else:
            _show_plan(planned, cell, as_json)
        return

    def bars() -> AbstractContextManager[Callable[[str, float, float], None] | None]:
        return progress_bar(quiet)

    def watch() -> AbstractContextManager[tuple[Any, Any]]:
        from rehead.recipes.training.commands import training_bar

        return training_bar(quiet) if not quiet else nullcontext((None, None))

    result = run_recipe(
        recipe, settings=settings, out=out, cell=cell, gather=gather, quiet=quiet or not sys.stderr.isatty(),
        say=None if quiet else _say, progress=bars, watch=watch,
    )  # fmt: skip
    if as_json:
        print_json(result.as_json())
    elif not quiet:
        show_result(result)


def _say(event: str, kind: str, text: str) -> None:
    echo(f"{_EVENTS[event]:>8}  {kind:<9} {text}", err=True)


def show_result(result: RecipeRun) -> None:
    """The verdict, then where the report lies."""
    if result.report is None:
        echo(f"done: {result.out}")
        return
    said = result.report.verdict
    echo()
    print_wrapped(said.headline)
    width = max((len(name) for name, _ in said.points), default=0)
    for name, text in said.points:
        print_wrapped(text, f"  {name.ljust(width)}  ")
    echo()
    echo(f"report: {result.report.html}")


def _show_cells(table: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(table)
        return
    for cell in table["cells"]:
        echo(f"{cell['index']:>4}  {cell['label'] or table['recipe']}")
        echo(f"      {cell['command']}")
    if table["shared"]:
        echo(f"shared by cells, made once: {', '.join(table['shared'])}")
    echo(f"then: {table['gather']}")


def _show_plan(planned: Planned, cell: int | None, as_json: bool) -> None:
    from rehead.recipes.pipeline.preview import preview

    rows = preview(planned, cell)
    if as_json:
        print_json({"out": str(planned.out), "stages": rows})
        return
    echo(f"{planned.recipe.name} -> {planned.out}")
    for row in rows:
        echo(
            f"  {row['action']:<5} {row['kind']:<9} {row['title']}" + (f"  ({row['reason']})" if row["reason"] else "")
        )
        if row["change"]:
            echo(f"        {row['change']}")


@click.group("recipes")
def recipes_command() -> None:
    """List, show, copy and check recipes."""


@recipes_command.command("ls")
@JSON
def list_command(as_json: bool) -> None:
    """List the recipes that ship with Rehead."""
    from rehead.recipes.pipeline.load import library_names, load_recipe

    rows = [{"name": name, "description": load_recipe(name).raw.get("description", "")} for name in library_names()]
    if as_json:
        print_json(rows)
        return
    print_columns([(row["name"], row["description"]) for row in rows])


@recipes_command.command("show")
@click.argument("name")
def show_command(name: str) -> None:
    """Print a recipe."""
    from rehead.recipes.pipeline.load import recipe_text

    echo(recipe_text(name)[0].rstrip("\n"), newlines=True)


@recipes_command.command("copy")
@click.argument("name")
@click.argument("file")
@click.option("--overwrite", is_flag=True, help="Replace FILE.  [default: off]")
def copy_command(name: str, file: str, overwrite: bool) -> None:
    """Copy the recipe NAME to FILE, to change it there."""
    from pathlib import Path

    from rehead.checkpoints.files import write_file
    from rehead.errors import UsageError
    from rehead.recipes.pipeline.load import recipe_text

    text = recipe_text(name)[0]
    path = Path(file)
    path = path / f"{name}.yaml" if path.is_dir() else path
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists already; choose another name or give --overwrite")
    write_file(path, text)
    echo(f"wrote {path}")


@recipes_command.command("validate")
@click.argument("file")
@SETTINGS
@JSON
def validate_command(file: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe, every cell of it, without opening a model or a text."""
    from rehead.recipes.pipeline.run import plan_recipe

    planned = plan_recipe(file, settings)
    stages = {name for plan in planned.cells for name in plan.stages}
    if as_json:
        facts = {
            "name": planned.recipe.name,
            "cells": len(planned.cells),
            "stages": len(stages),
            "out": str(planned.out),
        }
        print_json(facts)
        return
    cells = f"{len(planned.cells)} cells, " if planned.sweep else ""
    echo(f"{file} is valid: {cells}{len(stages)} stage{'s' * (len(stages) != 1)}")
