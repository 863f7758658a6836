"""Which layers: ``all``, ``auto``, or a list such as ``0,4-7``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rehead.errors import UsageError

AUTO = "auto"


def parse_layers(text: str | Sequence[int] | None, count: int) -> list[int]:
    """Layer indices from 0, ascending.

    Args:
        text: None or ``"all"``, ``"0,4-7"``, or the indices themselves.
        count: layers of the model.

    Raises:
        UsageError: not a list of layers, or one that the model does not have.
    """
    if text is None or text == "all":
        return list(range(count))
    if isinstance(text, str):
        chosen: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
            if match is None:
                raise UsageError(f"--layers {text}: {part.strip()!r} is no layer; write auto, all or a list like 0,4-7")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise UsageError(f"--layers {text}: {part.strip()!r} runs backwards; write {last}-{first}")
            chosen += range(first, max(first, min(last, count)) + 1)  # one beyond the end is enough to be refused
    else:
        chosen = [int(layer) for layer in text]
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"--layers: layer {wrong[0]} does not exist; the model's layers are 0 to {count - 1}")
    if not chosen:
        raise UsageError("--layers: names no layer; write auto, all or a list like 0,4-7")
    return sorted(set(chosen))
