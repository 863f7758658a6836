"""Facts that a run keeps beside its work, so that a run that goes on from it can still say them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from rehead.checkpoints.stream import write_error


class Notes:
    """Facts by key, each on disk as soon as it is noted.

    Args:
        path: the file; what an earlier run noted there is read back.
        name: what an error names.

    Attributes:
        facts: everything noted, by key.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self.facts: dict[str, Any] = self._read()

    def note(self, key: str, value: Any) -> None:
        """Keep a fact (JSON types).

        Raises:
            ResourceError: the disk does not take it.
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
        found: dict[str, Any] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return found
        for line in filter(None, lines):
            with contextlib.suppress(ValueError, TypeError):  # what a kill cut short is computed again
                key, value = json.loads(line)
                found[key] = value
        return found
