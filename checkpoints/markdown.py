"""Escape untrusted text for Markdown, and read the metadata at the head of a model card."""

from __future__ import annotations

import re
from typing import Any

import yaml

from rehead.checkpoints.plain_yaml import read_yaml
from rehead.console import printable

_LONGEST = 300
_MOST = 200
_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def code(text: object) -> str:
    """A text as a Markdown code span on one line; backticks in it are safe."""
    line = printable(text)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: object) -> list[str]:
    """A text as the lines of a Markdown code block; backticks in it are safe."""
    lines = printable(text, newlines=True)
    fence = "`" * max(3, _longest_run(lines) + 1)
    return [fence, lines, fence]


def plain(text: object) -> str:
    """A text for a paragraph, heading or table cell, with HTML, links and emphasis escaped."""
    line = printable(" ".join(str(text).split()))
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", line)


_QUOTED = re.compile(r"""(['"])(?:~|\.{1,2})?/[^'"\n]*?([^/'"\n]+)/?\1""")
_FOLDERS = re.compile(r"""(?<![\w.:/@~-])(?:~|\.{1,2})?/(?:[^\s'"=,;/]+/)*([^\s'"=,;/]+)/?""")


def without_folders(text: str) -> str:
    """A text, such as a command line, with the last name of each local path in the path's place.

    People on other machines read the card, and folders of the machine that made the model mean nothing there. Paths
    that begin with ``/``, ``~/``, ``./`` or ``../`` count; Hub ids and URLs stay.
    """
    return _FOLDERS.sub(r"\1", _QUOTED.sub(r"\1\2\1", text))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def front_matter(card: str) -> dict[str, str | list[str]]:
    """The metadata at the head of a model card: only short texts and lists of them; empty without any."""
    match = _HEAD.match(card)
    if match is None:
        return {}
    try:
        data = read_yaml(match[1])
    except yaml.YAMLError:
        return {}
    values = data.items() if isinstance(data, dict) else ()
    return {key: value for key, raw in values if (value := _plain_value(raw))}


def _plain_value(raw: Any) -> str | list[str]:
    if isinstance(raw, list):
        return [text for item in raw[:_MOST] if not isinstance(item, list) and (text := str(_plain_value(item) or ""))]
    ok = isinstance(raw, (str, int, float)) and not isinstance(raw, bool)
    text = str(raw).strip() if ok else ""
    return text if text.isprintable() and len(text) <= _LONGEST else ""
