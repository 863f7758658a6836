"""Texts that ship with Rehead, which every flag for data accepts by name."""

from __future__ import annotations

from importlib.resources import files

from rehead.errors import UsageError, unknown_name

PREFIX = "built-in:"
#: Name -> (package, file).
TEXTS = {
    "built-in:calibration": ("rehead.data.assets", "calibration.txt.gz"),
    "built-in:speeches": ("rehead.recipes.assets", "speeches.txt.gz"),
    "built-in:heldout": ("rehead.recipes.assets", "heldout.txt.gz"),
}


def text_path(name: str) -> str:
    """The path of a built-in text, with its options; other names are returned unchanged.

    Raises:
        UsageError: there is no built-in text of that name.
    """
    if not name.startswith(PREFIX):
        return name
    plain, mark, options = name.partition("#")
    if plain not in TEXTS:
        raise UsageError(unknown_name("text", plain, TEXTS))
    package, file = TEXTS[plain]
    return f"{files(package) / file}{mark}{options}"
