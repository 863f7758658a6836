"""What a run tells: one JSON object a line, always; trackers where they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rehead.checkpoints.stream import write_error
from rehead.errors import UsageError, unknown_name

LOG_NAME = "training-log.jsonl"
Event = dict[str, Any]
Listener = Callable[[Event], None]


class RunLog:
    """The log of a run.

    Args:
        path: the file; None writes none (a process that is not the main one).
        trackers: of :func:`open_trackers`.
        listener: called with every event.

    Raises:
        ResourceError: the file cannot be opened.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Any] = (), listener: Listener | None = None) -> None:
        self._trackers, self._listener = trackers, listener
        self._path = path
        try:
            self._file = None if path is None else open(path, "ab")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise write_error(error, str(path)) from None

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; a figure that is no number (NaN, infinity) is written as null, which JSON has.

        Raises:
            ResourceError: the disk is full.
        """
        line: Event = {"event": event, **facts}
        if self._file is not None and self._path is not None:
            try:
                self._file.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False).encode() + b"\n")
                self._file.flush()
            except OSError as error:
                raise write_error(error, self._path.name) from None
        if event in ("step", "evaluation"):
            figures = {f"{event}/{key}": value for key, value in facts.items() if isinstance(value, (int, float))}
            for tracker in self._trackers:
                tracker.log(figures, step=facts.get("step"))
        if self._listener is not None:
            self._listener(line)

    def position(self) -> int:
        """Bytes in the log, all of them on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Drop what was written behind a checkpoint that the run resumes from."""
        if self._file is not None:
            self._file.truncate(position)
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file and finish the trackers."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(names: Sequence[str], out: Path, config: dict[str, Any]) -> list[Any]:
    """Trackers of accelerate by name.

    Args:
        names: such as ``tensorboard``, ``wandb``, ``trackio``.
        out: the run is called after it; trackers that write files do so in ``runs`` beside it.
        config: the run's options.

    Raises:
        UsageError: no such tracker, or its package is not installed.
    """
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState()
    known = {str(getattr(name, "value", name)): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    ready = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    found = []
    for name in names:
        if name not in known:
            raise UsageError(f"--tracker: {unknown_name('tracker', name, known)}")
        if name not in ready:
            raise UsageError(f"--tracker {name}: is not installed; run `pip install {name}`")
        kind = known[name]
        places = {"logging_dir": str(out.parent / "runs")} if kind.requires_logging_directory else {}
        tracker = kind(out.name, **places)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration({key: _flat(value) for key, value in config.items()})
        found.append(tracker)
    return found


def _flat(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else json.dumps(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
