"""The first steps of ``--resume``: refuse another run's output, and finish one that lacked only its final rename."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehead.checkpoints.manifest import completed, read_manifest, verify_files
from rehead.checkpoints.outputs import check_out, out_path
from rehead.checkpoints.staging import (
    Staging,
    fingerprint_of,
    noted_parts,
    only_unpublished,
    refuse_other,
    staging_path,
)
from rehead.errors import ReheadError, UsageError


def check_start(
    out: str | os.PathLike[str], source_folder: Path | None, parts: Mapping[str, Any], resume: bool, overwrite: bool
) -> None:
    """Refuse, before any work, an OUT that cannot be written or resumed.

    Args:
        out: the output folder.
        source_folder: the source's folder when it is local.
        parts: those named parts of the fingerprint that are known by now.

    Raises:
        UsageError: as :func:`~rehead.checkpoints.outputs.check_out`; or ``resume``, and what was interrupted or
            completed there differs in one of the parts.
    """
    path = out_path(out)
    if not resume:
        check_out(path, source_folder, overwrite)
        return
    now, earlier = fingerprint_of(parts)[1], noted_parts(path)
    if earlier is not None:
        refuse_other(path, _differing(now, earlier))
    elif os.path.lexists(path) and not overwrite:
        try:
            differ = _differing(now, read_manifest(path).get("fingerprint_parts") or {})
        except ReheadError:
            check_out(path, source_folder, overwrite)
            raise
        if differ:
            what = ", ".join(differ).replace("asked", "options")
            raise UsageError(f"{path}: is complete, with other {what}; choose another OUT or give --overwrite")


def _differing(now: Mapping[str, str], earlier: Mapping[str, str]) -> list[str]:
    return [name for name in now if name in earlier and earlier[name] != now[name]]


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
