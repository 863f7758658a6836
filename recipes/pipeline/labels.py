"""What evaluations and reports call the models and texts of a recipe: names, not the places where they lay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rehead.data import builtin
from rehead.recipes.pipeline.graph import Stage


def shown_names(stages: Iterable[Stage], out: Path) -> dict[str, str]:
    """Name by path, longest path first.

    Built-in texts have their names, what the recipe made its folder's name, and everything else its file's.

    Args:
        stages: every stage of a recipe.
        out: the recipe's folder.
    """
    built_in = {builtin.text_path(text): text for text in builtin.TEXTS}
    names = {f"{out}/": ""}
    for stage in stages:
        for text in (text for texts in stage.data.values() for text in texts):
            plain, mark, options = text.partition("#")
            if Path(plain).is_absolute():
                names[text] = built_in.get(plain, Path(plain).name) + mark + options
        for place in stage.models.values():
            if place.model is not None and Path(place.model).is_absolute():
                names[place.model] = Path(place.model).name
    return dict(sorted(names.items(), key=lambda pair: -len(pair[0])))


def renamed(value: Any, shown: dict[str, str]) -> Any:
    """JSON types with paths replaced by names, in keys too."""
    if isinstance(value, dict):
        return {renamed(key, shown): renamed(item, shown) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, shown) for item in value]
    if isinstance(value, str):
        for path, name in shown.items():
            value = re.sub(_whole(path), name.replace("\\", r"\\"), value)
    return value


def _whole(path: str) -> str:
    """The pattern of a path by itself or with something below it: ``/m`` in ``/m/x``, not in ``/m2`` or ``/a/m``."""
    after = "" if path.endswith("/") else r"(?![\w-]|\.\w)"
    return r"(?<![\w./-])" + re.escape(path) + after
