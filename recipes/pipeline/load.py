"""Reading recipes: YAML from a file or the library, ``--set``, and what relative paths are relative to."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rehead.checkpoints.plain_yaml import read_yaml
from rehead.errors import UsageError, first_line, unknown_name

MAX_BYTES = 1_000_000
#: Keys whose values name files, folders, or things on the Hub.
PATH_KEYS = frozenset({
    "model", "out", "new.data", "convert.calibration", "uptrain.data", "uptrain.teacher", "uptrain.eval_data",
    "control.data", "control.eval_data", "evaluate.data", "evaluate.tasks_dir", "launch.config",
})  # fmt: skip
_TEXT_ENDINGS = (".txt", ".txt.gz", ".gz", ".md", ".rst", ".jsonl", ".json", ".parquet", ".yaml", ".yml")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe as written.

    Attributes:
        raw: its keys, with paths made absolute.
        origin: the file, or the library's name; what the user gave.
        base: the folder that the recipe's own relative paths start from.
    """

    raw: dict[str, Any]
    origin: str
    base: Path


def library_names() -> list[str]:
    """The recipes that ship with Rehead."""
    folder = files("rehead.recipes.library")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(recipe: str) -> tuple[str, str, Path]:
    """A recipe's YAML, its origin and the folder of its relative paths, from a file or a library name.

    Raises:
        UsageError: there is neither; or the file cannot be read.
    """
    names = library_names()
    if recipe in names and not os.path.isfile(recipe):
        text = (files("rehead.recipes.library") / f"{recipe}.yaml").read_text(encoding="utf-8")
        return text, recipe, Path.cwd()
    path = Path(recipe).expanduser()
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UsageError(f"{recipe}: no such file; give a recipe's file or one of {', '.join(names)}")
        raise UsageError(unknown_name("recipe", recipe, names))
    return text_of(path, recipe, "a recipe's file"), str(path), path.absolute().parent


def text_of(path: Path, where: str, what: str) -> str:
    """The text of a small file that a user wrote.

    Args:
        path: there is such a file.
        where: what messages call it.
        what: what it should be.

    Raises:
        UsageError: it is too large, is no text, or cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{where}: is larger than {MAX_BYTES} bytes; give {what}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{where}: cannot be read ({reason}); give {what}") from None


def load_recipe(recipe: str, settings: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and apply ``--set``; nothing is checked yet but the form.

    Args:
        recipe: a file, or the name of a shipped recipe.
        settings: ``"a.b=value"``, the value being YAML; later ones win. Relative paths in them start from the working
            folder, those in the recipe from the recipe's own (a shipped recipe's from the working folder).

    Raises:
        UsageError: no such recipe, no YAML mapping, a key twice, or an invalid setting.
    """
    text, origin, base = recipe_text(recipe)
    raw = parse_yaml(text, origin)
    if not isinstance(raw, dict):
        raise UsageError(f"{origin}: is no mapping; a recipe has keys such as model, convert and evaluate")
    raw = with_places(raw, base)
    swept = set(_swept_keys(raw.get("sweep")))
    for setting in settings:
        key, value = parse_setting(setting)
        if key in swept:
            raise UsageError(f"--set {key}: the recipe's sweep varies it; set sweep itself, or choose a --cell")
        put(raw, key, value, f"--set {setting}")
    return LoadedRecipe(with_places(raw, Path.cwd()), origin, base)


def parse_yaml(text: str, origin: str) -> Any:
    """YAML to plain values, safely.

    Raises:
        UsageError: it is no YAML; the line says where.
    """
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UsageError(f"{origin}: is no YAML{where} ({problem}); fix it") from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """``"a.b=value"`` to key and value.

    Raises:
        UsageError: there is no key or no ``=``.
    """
    key, equals, value = setting.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UsageError(f"--set {setting}: has no key and value; write it as --set convert.method=svd")
    return key, parse_yaml(value, f"--set {key}")


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key, making the sections on the way.

    Raises:
        UsageError: something on the way is no section.
    """
    *sections, last = key.split(".")
    at = raw
    for name in sections:
        inner = at.get(name)
        if inner is None or (name == "control" and isinstance(inner, bool)):
            inner = at[name] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{where}: {name} is {inner!r}, not a section; set {name} itself")
        at = inner
    at[last] = value


def with_places(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy of the recipe in which relative paths are absolute."""
    table = copy.deepcopy(raw)
    for dotted in PATH_KEYS:
        *sections, last = dotted.split(".")
        at: Any = table
        for name in sections:
            at = at.get(name) if isinstance(at, dict) else None
        if isinstance(at, dict) and last in at:
            at[last] = _placed(at[last], base, dotted)
    sweep: Any = table.get("sweep")
    for axis, values in sweep.items() if isinstance(sweep, dict) else ():
        if axis in PATH_KEYS and isinstance(values, list):
            sweep[axis] = [_placed(value, base, axis) for value in values]
        elif isinstance(values, dict):
            for overrides in values.values():
                for key in PATH_KEYS & set(overrides) if isinstance(overrides, dict) else ():
                    overrides[key] = _placed(overrides[key], base, key)
    return table


def _placed(value: Any, base: Path, key: str) -> Any:
    if isinstance(value, list):
        return [_placed(item, base, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    name, mark, options = (value, "", "") if (base / value).exists() else value.partition("#")
    path = Path(name).expanduser()
    local = (
        key == "out"
        or path.is_absolute()
        or name.startswith((".", "~"))
        or (name.lower().endswith(_TEXT_ENDINGS) and ":" not in name)
        or (base / path).exists()
    )
    # What is no path is a Hub id, a built-in name, or missing; the stage that reads it says which.
    return f"{os.path.abspath(base / path)}{mark}{options}" if local else value


def _swept_keys(sweep: Any) -> Iterable[str]:
    for axis, values in sweep.items() if isinstance(sweep, dict) else ():
        if isinstance(values, list):
            yield axis
        elif isinstance(values, dict):
            for overrides in values.values():
                yield from overrides if isinstance(overrides, dict) else ()
