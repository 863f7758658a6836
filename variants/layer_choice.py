"""Which layers: ``all``, ``auto`` (``auto:6``, ``auto:50%``), or a list such as ``0,4-7``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rehead.errors import UsageError

AUTO = "auto"
ATTENDING = "with attention"


def is_auto(layers: str | Sequence[int] | None) -> bool:
    """Whether layers are to be chosen by what they lose.

    Raises:
        UsageError: ``auto:`` is followed by neither a number of layers nor a share of them.
    """
    if not isinstance(layers, str) or layers.partition(":")[0] != AUTO:
        return False
    if layers != AUTO and _limit(layers) is None:
        raise UsageError(
            f"--layers {layers}: is neither a number of layers nor a share of them; write auto:6 or auto:50%"
        )
    return True


def auto_count(layers: str, count: int) -> int | None:
    """How many layers ``auto:6`` or ``auto:50%`` means in a model of ``count``; None where ``auto`` sets no number.

    Raises:
        UsageError: more layers than there are.
    """
    match = _limit(layers)
    if match is None:
        return None
    if match[2]:
        if not 0 < int(match[1]) <= 100:
            raise UsageError(f"--layers {layers}: must be more than 0 and at most 100 per cent")
        return max(1, round(count * int(match[1]) / 100))
    if not 1 <= int(match[1]) <= count:
        raise UsageError(f"--layers {layers}: the model has {count} layers; choose from 1 to {count}")
    return int(match[1])


def _limit(layers: str) -> re.Match[str] | None:
    return re.fullmatch(r"auto:(\d{1,6})(%?)", layers)


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
    chosen = named_layers(text, count)
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong:
        raise UsageError(f"--layers: layer {wrong[0]} does not exist; the model's layers are 0 to {count - 1}")
    return chosen


def named_layers(text: str | Sequence[int], most: int = 1 << 20) -> list[int]:
    """Layer indices that a list names, ascending, whatever the model has.

    Args:
        text: ``"0,4-7"``, or the indices themselves.
        most: where a range that runs beyond all layers is cut.

    Raises:
        UsageError: not a list of layers.
    """
    if isinstance(text, str):
        chosen: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
            if match is None:
                raise UsageError(f"--layers {text}: {part.strip()!r} is no layer; write auto, all or a list like 0,4-7")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise UsageError(f"--layers {text}: {part.strip()!r} runs backwards; write {last}-{first}")
            chosen += range(first, max(first, min(last, most)) + 1)  # one beyond the end is enough to be refused
    else:
        chosen = [int(layer) for layer in text]
    if not chosen:
        raise UsageError("--layers: names no layer; write auto, all or a list like 0,4-7")
    return sorted(set(chosen))


def layers_among(
    text: str | Sequence[int] | None, count: int, known: Sequence[int], kind: str = ATTENDING
) -> list[int]:
    """Those layers that a list names among the ones that can change, ascending.

    Args:
        text: as of :func:`parse_layers`.
        count: layers of the model.
        known: those that can change.
        kind: what these are, for messages.

    Raises:
        UsageError: as :func:`parse_layers`; or none of the named layers can change.
    """
    wanted = set(parse_layers(text, count))
    if not wanted & set(known):
        check_known(wanted, known, kind)
    return sorted(wanted & set(known))


def check_known(wanted: set[int], known: Sequence[int], kind: str = ATTENDING) -> None:
    """Raise :class:`UsageError` for a layer that is none of those that can change."""
    if wrong := sorted(wanted - set(known)):
        in_a_row = 1 < len(known) == known[-1] - known[0] + 1
        ways = f"{known[0]} to {known[-1]}" if in_a_row else ", ".join(map(str, known)) or "none"
        raise UsageError(f"layers: {wrong[0]} is not a layer {kind}; choose from {ways}")
