"""Upload to the Hub, only when asked: a folder that is verified before and after, or the files of a report."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rehead.checkpoints.hub_errors import chain, hub_error, retried
from rehead.checkpoints.manifest import MANIFEST_NAME, verify_files
from rehead.checkpoints.safetensors_io import shown
from rehead.checkpoints.stream import ResourceError
from rehead.errors import ReheadError, UnsupportedError, UsageError, VerificationError, first_line

__all__ = ["push_files", "push_folder"]


def push_folder(
    out: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Upload a converted folder to a model repository in one commit; a missing repository is created.

    The folder is verified first and exactly the manifest's files are sent, so a fresh download verifies too. Files of
    an earlier Rehead upload that are no longer part of it are deleted in the same commit; a repository with any other
    file is refused.

    Args:
        out: the converted folder.
        repo_id: ``"owner/name"``.
        private: for a new repository; the account's default when None.
        revision: an existing branch to commit to; the default branch when None.
        token: as everywhere in ``huggingface_hub``.
        message: the commit's message.
        progress: called with (bytes hashed, bytes in all) while the folder is verified.

    Returns:
        The commit's URL.

    Raises:
        UsageError: the repository holds files that are not Rehead's, or the id is not valid.
        VerificationError: the folder does not match its manifest, or the uploaded files do not.
        UnsupportedError: the Hub refuses.
        ResourceError: the connection was lost; pushing again sends only what is missing.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(out)
    table = verify_files(folder, progress)
    names = [*table["files"], MANIFEST_NAME]
    api = HfApi(token=token)
    with _push_translated(repo_id):
        retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        before = retried(lambda: api.model_info(repo_id, revision=revision))
        there = {s.rfilename for s in before.siblings or ()} - {".gitattributes"}
        strays = sorted(there - set(names))
        if strays and MANIFEST_NAME not in there:
            raise UsageError(
                f"{repo_id}: has files that Rehead did not write ({shown(strays[0])}); choose another repository"
            )
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in strays]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or "Upload a checkpoint converted with Rehead",
            revision=revision,
            parent_commit=before.sha,
        )
        after = retried(lambda: api.model_info(repo_id, revision=commit.oid, files_metadata=True))
    _check_upload(repo_id, table["files"], {s.rfilename: s for s in after.siblings or ()})
    return str(commit.commit_url)


def push_files(
    files: Mapping[str, Path], repo_id: str, *, mine: str, message: str, token: str | bool | None = None
) -> str:
    """Add files to a model repository in one commit; a missing repository is created, other files stay.

    Args:
        files: local path by name in the repository.
        repo_id: ``"owner/name"``.
        mine: the name whose presence says that an earlier upload made the others there, so that they may be replaced.
        message: the commit's message.
        token: as everywhere in ``huggingface_hub``.

    Returns:
        The commit's URL.

    Raises:
        UsageError: the repository holds other files of these names, or the id is not valid.
        UnsupportedError: the Hub refuses.
        ResourceError: the connection was lost; pushing again sends only what is missing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _push_translated(repo_id):
        retried(lambda: api.create_repo(repo_id, exist_ok=True))
        before = retried(lambda: api.model_info(repo_id))
        there = {s.rfilename for s in before.siblings or ()}
        taken = sorted(there & files.keys())
        if taken and mine not in there:
            raise UsageError(
                f"{repo_id}: holds {shown(taken[0])}, which Rehead did not write; choose another repository"
            )
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=before.sha)
    return str(commit.commit_url)


@contextlib.contextmanager
def _push_translated(repo_id: str) -> Iterator[None]:
    try:
        yield
    except ReheadError:
        raise
    except Exception as err:
        status = next((r.status_code for e in chain(err) if (r := getattr(e, "response", None)) is not None), None)
        if status in (401, 403):
            raise UnsupportedError(
                f"{repo_id}: the Hub refuses the upload ({status}); log in with a writing token (`hf auth login`)"
            ) from None
        if status in (409, 412):
            raise UnsupportedError(f"{repo_id}: somebody else changed it during the upload; push again") from None
        mapped = hub_error(err, repo_id, None)
        if isinstance(mapped, ResourceError):
            raise ResourceError(
                f"{repo_id}: the connection to the Hub failed during the upload; push again, what arrived is not resent"
            ) from None
        if mapped is None and isinstance(err, ValueError):
            raise UnsupportedError(f"{repo_id}: the Hub refuses the upload ({first_line(err)}); fix that") from None
        if mapped is None:
            raise
        raise mapped from None


def _check_upload(repo_id: str, files: dict[str, Any], remote: dict[str, Any]) -> None:
    """Compare the Hub's list of files with the manifest: sizes, and SHA-256 where the Hub has one (LFS files)."""
    for name, entry in files.items():
        there = remote.get(name)
        lfs = getattr(there, "lfs", None)
        if (
            there is None
            or (there.size is not None and there.size != entry["size"])
            or (lfs is not None and lfs.sha256 != entry["sha256"])
        ):
            raise VerificationError(f"{repo_id}/{name}: the file on the Hub differs from the one sent; push again")
