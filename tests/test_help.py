"""What ``--help`` says: the default of every option, whoever declares it."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from rehead.cli import cli


def options(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command, click.Option]]:
    context = click.Context(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from options(inner, (*path, name))
    if path:  # `rehead --version` and `--help` do not change what a command does
        yield from ((" ".join(path), command, each) for each in command.params if isinstance(each, click.Option))


ALL = list(options(cli))


@pytest.mark.parametrize(("name", "command", "option"), ALL, ids=[f"{name} {each.opts[0]}" for name, _, each in ALL])
def test_help_states_the_default(name: str, command: click.Command, option: click.Option) -> None:
    record = option.get_help_record(click.Context(command, info_name=name))
    assert record is not None
    stated = "[required]" if option.required else "[default: "
    assert stated in record[1] or "; default: " in record[1], f"rehead {name}: {record}"


def test_the_walk_sees_every_command() -> None:
    seen = {name.split()[0] for name, _, _ in ALL}
    assert {"convert", "evaluate", "uptrain", "run", "verify", "recipes", "patches"} <= seen
    assert len(ALL) > 100
