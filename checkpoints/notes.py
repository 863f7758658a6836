"""Facts that a run saves as it works, so that a resumed run can still report them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rehead.checkpoints.stream import write_error


class Notes:
    """Facts by key, each saved to disk at once.

    Args:
        path: the file; facts of an earlier run in it are read back.
        name: the output folder, for error messages.

    Attributes:
        facts: every fact, by key.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self.facts: dict[str, Any] = self._read()

    def note(self, key: str, value: Any) -> None:
        """Save a fact (JSON types).

        Raises:
            ResourceError: the disk is full or fails.
        """
        self.facts[key] = value
        try:
            with open(self._path, "a", encoding="utf-8") as f:
                f.write("\n" + json.dumps([key, value]) + "\n")  # on a line of its own even after one cut short
                f.flush()
                os.fsync(f.fileno())
        except OSError as err:
            raise write_error(err, self._name) from None

    def _read(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return facts
        for line in filter(None, lines):
            with contextlib.suppress(ValueError, TypeError):  # a line cut short by a kill: its fact is computed again
                key, value = json.loads(line)
                facts[key] = value
        return facts
