"""The first step of ``--resume``: check whether the earlier run was complete but for its final rename."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rehead.checkpoints.manifest import completed, verify_files
from rehead.checkpoints.outputs import out_path
from rehead.checkpoints.staging import Staging, fingerprint_of, only_unpublished, staging_path
from rehead.errors import ReheadError


def finish_commit(out: str | os.PathLike[str], fingerprint: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """Finish a run that was killed in its very last step: do the rename if it is missing.

    Args:
        out: the output folder.
        fingerprint: as for :class:`Target`.

    Returns:
        The manifest when ``out`` is complete now; None when work is left, which :class:`Target` resumes.

    Raises:
        UsageError: another run is writing ``out``.
        ResourceError: the rename failed.
    """
    path, (whole, parts) = out_path(out), fingerprint_of(fingerprint)
    if only_unpublished(path) and not os.path.lexists(path):
        try:
            same = verify_files(staging_path(path), allow_extra=True).get("fingerprint") == whole
        except ReheadError:
            same = False
        if same:
            Staging(path, whole, parts, resume=True).publish(overwrite=False)
    return completed(path, whole)
