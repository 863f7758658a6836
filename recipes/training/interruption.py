"""Ctrl-C and SIGTERM: finish the step, keep a checkpoint, then stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from rehead.errors import EXIT_INTERRUPTED, ReheadError


class Interrupted(ReheadError):
    """The run was asked to stop and has kept a checkpoint: exit code 130, or 143 for SIGTERM."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number


class StopRequests:
    """Notes the first SIGINT or SIGTERM inside a ``with`` block; the second acts at once, as it would have.

    Args:
        announce: say on standard error that the step is finished first; a step can take a minute.

    Attributes:
        number: the signal that came, or 0.
    """

    def __init__(self, announce: bool = False) -> None:
        self.number = 0
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self._announce:
            # Past Python's streams, which the signal may have found in the middle of a write.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once, without\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
