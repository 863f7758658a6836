"""Options as flags of a click command: each field of a class gives one, and ``--help`` says every default."""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click
from pydantic.fields import FieldInfo

from rehead.options import Options, flag_note, flag_of
from rehead.typehints import alternatives, choices, is_tuple

F = TypeVar("F", bound=Callable[..., Any])


def flags(options: type[Options], without: Collection[str] = ()) -> Callable[[F], F]:
    """A decorator that gives a click command one flag for each field of ``options``, except those in ``without``.

    The command receives the unchecked values under the fields' names; :func:`set_by_user` drops unused flags.
    """

    def decorate(command: F) -> F:
        for name, entry in reversed(options.model_fields.items()):
            if name not in without:
                command = _click_option(options, name, entry)(command)
        return command

    return decorate


def set_by_user(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the user wrote, from all the values that click passes."""
    return {name: value for name, value in values.items() if value not in (None, (), False)}


def _click_option(options: type[Options], name: str, entry: FieldInfo) -> Callable[[Any], Any]:
    spelled = list(dict.fromkeys([flag_of(options, name), "--" + name.replace("_", "-")]))
    kinds = [kind for kind in alternatives(entry.annotation) if kind is not type(None)]
    settings: dict[str, Any] = {"default": None, "required": entry.is_required()}
    if kinds == [bool]:
        settings |= {"is_flag": True, "help": f"{entry.description}  [default: off]"}
        return click.option(*spelled, name, **settings)
    settings |= {
        "metavar": flag_note(entry).metavar or _metavar(kinds),
        "help": f"{entry.description}{_default(entry)}",
    }
    arguments = typing.get_args(kinds[0])
    if all(is_tuple(kind) for kind in kinds) and Ellipsis not in arguments:
        settings |= {"nargs": len(arguments), "type": float, "metavar": " ".join("X" * len(arguments))}
    elif all(is_tuple(kind) or typing.get_origin(kind) is dict for kind in kinds):
        settings |= {"multiple": True}
    return click.option(*spelled, name, **settings)


def _metavar(kinds: list[Any]) -> str:
    if names := [name for kind in kinds for name in choices(kind)]:
        return "|".join(names)
    text = str(kinds[0])
    number = "N" if "int" in text else "X" if "float" in text else "NAME"
    return f"{number}[,{number}]" if is_tuple(kinds[0]) and number != "NAME" and "..." in text else number


def _default(entry: FieldInfo) -> str:
    """The end of a flag's help: ``[default: ...]``, or nothing for a required flag."""
    if entry.is_required():
        return ""
    value = entry.get_default(call_default_factory=True)
    said = flag_note(entry).default
    if said is None:
        listed = ", ".join(map(str, value)) if isinstance(value, (tuple, list, dict)) else value
        said = "none" if value is None or listed == "" else str(listed)
    return f"  [default: {said}]"
