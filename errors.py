"""The errors a user can meet.

Each carries one line that names the thing, the reason and the remedy, and the exit code the CLI ends with. Library
callers catch :class:`ReheadError`; the CLI prints the line without a traceback.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3
EXIT_VERIFICATION = 4
EXIT_QUALITY = 5
EXIT_INTERRUPTED = 130


class ReheadError(Exception):
    """Base of all errors caused by the input or the environment rather than by Rehead."""

    exit_code = EXIT_UNSUPPORTED


class UsageError(ReheadError):
    """An invalid flag, argument or recipe: exit code 2."""

    exit_code = EXIT_USAGE


class UnsupportedError(ReheadError):
    """Input that is unsupported, unsafe or broken, or a resource that ran out: exit code 3."""

    exit_code = EXIT_UNSUPPORTED


class VerificationError(ReheadError):
    """Something Rehead promised did not hold when it was checked: exit code 4."""

    exit_code = EXIT_VERIFICATION


class QualityError(ReheadError):
    """A quality gate that the user set was not met: exit code 5."""

    exit_code = EXIT_QUALITY


def as_error(error: BaseException) -> ReheadError | None:
    """What an exception says to a user: of Rehead's own, of files, or of memory that is full; None for any other."""
    if isinstance(error, ReheadError):
        return error
    if isinstance(error, OSError):
        # Commands name their own files; what is left is standard output, or a place that nobody may look into.
        where = error.filename if error.filename is not None else "standard output"
        remedy = "check the path and its permissions" if error.filename is not None else "check where it goes"
        return UnsupportedError(f"{where}: {(error.strerror or str(error)).lower()}; {remedy}")
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    ):
        return None
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    size = f": {wanted[1]} more cannot be had" if wanted else ""
    remedy = "free some, or ask for less: fewer tokens, smaller batches, --device cpu"
    return UnsupportedError(f"memory is full{size}; {remedy}")


_OUTPUTS: dict[str, tuple[int, int] | None] = {}


def output_expected(path: str | os.PathLike[str]) -> None:
    """Remember the state of a path that is about to be written, so that an interruption can report what was written."""
    _OUTPUTS.setdefault(os.fspath(path), _state_of(os.fspath(path)))


def forget_outputs() -> None:
    """Forget all remembered paths; called when a command begins."""
    _OUTPUTS.clear()


def outputs_written() -> list[str]:
    """The remembered paths that exist now and have changed: those that have been written."""
    return [path for path, before in _OUTPUTS.items() if (now := _state_of(path)) is not None and now != before]


def _state_of(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not registered; suggests the nearest known one.

    Args:
        kind: what is being named, e.g. ``"method"``.
        name: what the user wrote.
        known: every accepted name.
    """
    return f"unknown {kind} {name!r}; {suggestion(name, known)}"


def check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse the first of several names that is not registered, with :func:`unknown_name`'s message.

    Raises:
        UsageError: there is one.
    """
    for name in names:
        if name not in known:
            raise UsageError(unknown_name(kind, name, known))


def suggestion(name: str, known: Iterable[str]) -> str:
    """The known name nearest to what the user wrote, or all of them where none is near."""
    names = sorted(known)
    swapped = [known for known in names if sorted(known) == sorted(name)]
    near = swapped or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line with text of another library's error, at most ``most`` characters, or the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:most] if lines else type(error).__name__
