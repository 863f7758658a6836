"""What ``--resume`` does before anything is computed: see whether an earlier run was as good as done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehead.checkpoints.manifest import completed, verify_files
from rehead.checkpoints.staging import Staging, fingerprint_of, only_unpublished, staging_path
from rehead.errors import ReheadError


def finish_commit(out: str | os.PathLike[str], fingerprint: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """What is left to do for a run that resumes one killed in its very last step: at most the rename, done here.

    Args:
        out: the output folder.
        fingerprint: as for :class:`Target`.

    Returns:
        The manifest when ``out`` is complete now; None when there is work left, for :class:`Target` to go on with.

    Raises:
        UsageError: another run is writing ``out``.
        ResourceError: the rename failed.
    """
    path, (whole, parts) = Path(os.path.abspath(out)), fingerprint_of(fingerprint)
    if only_unpublished(path) and not os.path.lexists(path):
        try:
            same = verify_files(staging_path(path), allow_extra=True).get("fingerprint") == whole
        except ReheadError:
            same = False
        if same:
            Staging(path, whole, parts, resume=True).publish(overwrite=False)
    return completed(path, whole)
