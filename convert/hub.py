"""Checkpoints on the Hugging Face Hub: read by header, fetched when a weight is asked for, pushed when verified.

Opening a repository moves its file list, ``config.json``, the index and the shards' headers (by HTTP ranges), so
planning a 70B model costs well under a megabyte. All of it goes through ``huggingface_hub``: cache, endpoint, token.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rehead.convert.contents import INDEX_FILE, MAX_CONFIG_BYTES, gather, parse_config, pick_layout
from rehead.convert.manifest import MANIFEST_NAME, verify_files
from rehead.convert.safetensors_io import Header, header_length, parse_header, parse_index, shown
from rehead.convert.smallfiles import CONFIG_NAME
from rehead.convert.source import LocalSource, Source
from rehead.convert.stream import ResourceError, is_full, write_error
from rehead.errors import ReheadError, UnsupportedError, UsageError, VerificationError, first_line

__all__ = ["HubSource", "push_folder"]

_T = TypeVar("_T")
_ATTEMPTS = 4
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
_WAIT_S = 0.5
_BYTES_PER_TENSOR = 200  # a header entry is 90 to 160 bytes for the usual names, so one request is nearly always enough
_FIRST_GUESS = 100_000


class HubSource(Source):
    """A checkpoint on the Hub, pinned to the commit that its revision pointed to when it was opened.

    Args:
        repo_id: ``"owner/name"``, or the bare name of an old repository such as ``"gpt2"``.
        revision: branch, tag or commit; the default branch when None.
        token: as everywhere in ``huggingface_hub``; the stored one when None.

    Raises:
        UsageError: there is no such repository or revision.
        UnsupportedError: access is refused, or the checkpoint is in another format or broken.
        ResourceError: the Hub cannot be reached.
    """

    def __init__(self, repo_id: str, revision: str | None = None, *, token: str | bool | None = None) -> None:
        super().__init__()
        from huggingface_hub import HfApi

        self.id = repo_id
        self._token = token
        self._asked = revision
        self._api = HfApi(token=token)
        self._done: dict[str, Path] = {}
        self._cached: LocalSource | None = None
        with translated(repo_id, revision):
            try:
                info = retried(lambda: self._api.model_info(repo_id, revision=revision, files_metadata=True))
            except Exception as err:
                if type(err).__name__ != "OfflineModeIsEnabled":
                    raise
                self._open_cached(revision)
                return
        self.revision = info.sha
        self._siblings = {s.rfilename: s for s in info.siblings or ()}
        layout = pick_layout(set(self._siblings), repo_id)
        if CONFIG_NAME not in self._siblings:
            raise UsageError(f"{repo_id}: no config.json in it; give a transformers model's id")
        if (self._siblings[CONFIG_NAME].size or 0) > MAX_CONFIG_BYTES:
            raise UnsupportedError(f"{repo_id}/config.json: too large to be a model configuration; check the id")
        self.config = parse_config(self._fetch(CONFIG_NAME).read_bytes(), f"{repo_id}/config.json")
        index = self._fetch(INDEX_FILE).read_bytes() if layout == INDEX_FILE else None
        headers = self._headers(index)
        self.shards, self.tensors, self.metadata = gather(index, repo_id, headers.__getitem__)

    def _open_cached(self, revision: str | None) -> None:
        """Offline (``HF_HUB_OFFLINE``): what the cache holds of the repository, which must be complete."""
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(self.id, revision=revision, token=self._token, local_files_only=True))
        cached = LocalSource(folder, id=self.id)
        self._cached = cached
        self.revision = folder.name
        self._siblings = {}
        self.config, self.tensors, self.metadata, self.shards = (
            cached.config, cached.tensors, cached.metadata, cached.shards,
        )  # fmt: skip

    # ---- headers

    def _headers(self, index: bytes | None) -> dict[str, Header]:
        if index is None:
            return {"model.safetensors": self._header("model.safetensors", _FIRST_GUESS)}
        weight_map = parse_index(index, INDEX_FILE)
        counts: dict[str, int] = {}
        for shard in weight_map.values():
            counts[shard] = counts.get(shard, 0) + 1
        for shard in counts:
            if shard not in self._siblings:
                raise UnsupportedError(f"{self.id}: shard {shown(shard)} is missing on the Hub; tell its owner")
        with ThreadPoolExecutor(min(8, len(counts))) as pool:
            guess = {shard: min(_FIRST_GUESS, 600 + n * _BYTES_PER_TENSOR) for shard, n in counts.items()}
            found = pool.map(lambda shard: self._header(shard, guess[shard]), guess)
            return dict(zip(guess, found, strict=True))

    def _header(self, shard: str, guess: int) -> Header:
        size = self._siblings[shard].size
        with translated(self.id, self._asked, shard):
            raw, total = retried(lambda: self._range(shard, 0, guess))
            size = total if size is None else size
            length = header_length(raw[:8], size, shard)
            if len(raw) < 8 + length:
                rest, _ = retried(lambda: self._range(shard, len(raw), 8 + length))
                raw += rest
        if len(raw) < 8 + length:
            raise UnsupportedError(f"{shard}: the Hub sent less than the whole header; try again")
        return parse_header(raw[8 : 8 + length], size, shard)

    def _range(self, shard: str, start: int, end: int) -> tuple[bytes, int]:
        """Bytes [start, end) of a remote file, and the whole file's size; never more is read, whatever is sent."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.id, shard, revision=self.revision)
        headers = {
            **build_hf_headers(token=self._token), "range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"
        }  # fmt: skip
        with get_session().stream("GET", url, headers=headers, timeout=30) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
            if response.status_code == 206 and match and int(match[1]) == start:
                skip, total = 0, int(match[2])
            else:  # the range was ignored: the body is the whole file
                skip, total = start, int(response.headers.get("content-length") or 0)
            out = bytearray()
            for piece in response.iter_bytes(1 << 16):
                out += piece
                if len(out) >= skip + end - start:
                    break
        return bytes(out[skip : skip + end - start]), total

    # ---- files

    def _fetch(self, name: str) -> Path:
        """A file in the local cache, fetched if it is not there; an interrupted fetch goes on where it stopped."""
        if self._cached is not None:
            return self._cached.small_path(name)
        if name not in self._done:
            from huggingface_hub import hf_hub_download

            with translated(self.id, self._asked, name):
                # The client resumes a broken download by itself; the second attempt is for what it does not retry.
                got = retried(lambda: hf_hub_download(self.id, name, revision=self.revision, token=self._token), 2)
            path = Path(got)
            size = self._siblings[name].size if name in self._siblings else None
            if size is not None and path.stat().st_size != size:
                raise UnsupportedError(
                    f"{self.id}/{name}: the cached file has {path.stat().st_size} bytes, the Hub's {size}; "
                    f"delete {path.resolve()} and run again"
                )
            self._done[name] = path
        return self._done[name]

    def weight_path(self, shard: str) -> Path:
        return self._fetch(shard)

    def small_path(self, name: str) -> Path:
        return self._fetch(name)

    def list_files(self) -> list[str]:
        if self._cached is not None:
            return self._cached.list_files()
        return sorted(n for n in self._siblings if not n.startswith(("/", "..")) and "/../" not in n and "\\" not in n)

    def materialise(self, progress: Callable[[int, int], None] | None = None) -> None:
        total = sum(self._siblings[s].size or 0 for s in self.shards if s in self._siblings)
        done = 0
        for shard in self.shards:
            self._fetch(shard)
            done += (self._siblings[shard].size or 0) if shard in self._siblings else 0
            if progress is not None:
                progress(done, total)

    def identity(self) -> dict[str, str]:
        if self._cached is not None:
            return {"commit": str(self.revision)}
        return {"commit": str(self.revision), "repo": self.id}


# ---- errors


def retried(call: Callable[[], _T], attempts: int = _ATTEMPTS) -> _T:
    """``call()``, tried again after a dropped connection; whatever else fails is not."""
    for attempt in range(attempts):
        try:
            return call()
        except Exception as err:
            if attempt == attempts - 1 or not _is_dropped(err):
                raise
            time.sleep(_WAIT_S * 2**attempt)
    raise AssertionError


def _chain(err: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = err
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_dropped(err: BaseException) -> bool:
    """Whether a connection was lost or refused, as against an answer that says no."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(err, ReheadError):
        return False
    if isinstance(err, HfHubHTTPError):
        return err.response is not None and err.response.status_code >= 500
    for link in _chain(err):
        module = type(link).__module__.split(".")[0]
        if module.startswith("httpx") or module.startswith("httpcore"):
            return True
        if isinstance(link, (ConnectionError, TimeoutError)) and type(link).__name__ != "OfflineModeIsEnabled":
            return True
        if isinstance(link, OSError) and "Consistency check failed" in str(link):
            return True
    return False


@contextlib.contextmanager
def translated(repo_id: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises inside the block into one of Rehead's errors, one line each."""
    try:
        yield
    except ReheadError:
        raise
    except Exception as err:
        mapped = hub_error(err, repo_id, revision, file)
        if mapped is None:
            raise
        if file is None and _is_dropped(err):
            # Whoever meant a folder and mistyped it is not helped by words about the network alone.
            raise ResourceError(f"{mapped}; no local folder has this name") from None
        raise mapped from None


def hub_error(err: BaseException, repo_id: str, revision: str | None, file: str | None = None) -> ReheadError | None:
    """The one-line error for an exception of ``huggingface_hub``; None if it is no trouble with the Hub."""
    from huggingface_hub import constants, errors

    where = f"{repo_id}/{file}" if file else repo_id
    status = getattr(getattr(err, "response", None), "status_code", None)
    if isinstance(err, errors.HFValidationError):
        return UsageError(f"{repo_id}: neither a folder nor a valid Hub id; write it as owner/name")
    if isinstance(err, errors.GatedRepoError):
        return UnsupportedError(
            f"{repo_id}: is gated; accept its terms at {constants.ENDPOINT}/{repo_id} and log in with `hf auth login`"
        )
    if isinstance(err, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id}: has no revision {revision!r}; give a branch, tag or commit of it")
    if isinstance(err, errors.RepositoryNotFoundError):
        return UsageError(
            f"{repo_id}: neither a local folder nor a model on the Hub; check the id, and log in with `hf auth login` "
            "if it is private"
        )
    if isinstance(err, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)) and not _is_dropped(err):
        return UnsupportedError(f"{where}: is not in the local cache and the Hub is off; unset HF_HUB_OFFLINE")
    if isinstance(err, errors.EntryNotFoundError) and not isinstance(err, errors.LocalEntryNotFoundError):
        return UnsupportedError(f"{where}: is not on the Hub; check the revision")
    if status in (401, 403):
        return UnsupportedError(
            f"{where}: the Hub refuses access ({status}); log in with `hf auth login`, or ask its owner for access"
        )
    if status == 429:
        return ResourceError(f"{where}: the Hub asks to slow down (429); wait some minutes and run again")
    if status is not None and 400 <= status < 500:
        return UnsupportedError(f"{where}: the Hub refuses the request ({status}: {first_line(err)}); check the id")
    full = next((e for e in _chain(err) if isinstance(e, OSError) and is_full(e)), None)
    if full is not None:
        return write_error(full, f"{where}, in the Hub's cache")
    if isinstance(err, OSError) and err.errno in _UNWRITABLE:
        return ResourceError(
            f"{where}: the Hub's cache cannot be written ({err.filename}: {err.strerror}); set HF_HOME to a folder "
            "that can"
        )
    if _is_dropped(err):
        return ResourceError(
            f"{where}: the connection to the Hub failed; check the network and run again, what was fetched is kept"
        )
    return None


# ---- pushing


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
    """Upload a converted folder to a model repository, made if need be, in one commit.

    The folder is verified first and exactly the manifest's files are sent, so a fresh download verifies too. Files of
    an earlier Rehead upload that are no longer part of it are deleted in the same commit; a repository that holds
    anything else is left alone.

    Args:
        out: what a conversion wrote.
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
        VerificationError: the folder does not match its manifest, or the Hub ended up with something else.
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
                f"{repo_id}: holds files that Rehead did not write ({shown(strays[0])}); choose another repository"
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


@contextlib.contextmanager
def _push_translated(repo_id: str) -> Iterator[None]:
    try:
        yield
    except ReheadError:
        raise
    except Exception as err:
        status = next((r.status_code for e in _chain(err) if (r := getattr(e, "response", None)) is not None), None)
        if status in (401, 403):
            raise UnsupportedError(
                f"{repo_id}: the Hub refuses the upload ({status}); log in with a writing token (`hf auth login`)"
            ) from None
        if status in (409, 412):
            raise UnsupportedError(f"{repo_id}: was changed by somebody else meanwhile; push again") from None
        mapped = hub_error(err, repo_id, None)
        if isinstance(mapped, ResourceError):
            raise ResourceError(
                f"{repo_id}: the connection to the Hub failed during the upload; push again, what arrived is not resent"
            ) from None
        if mapped is None and isinstance(err, ValueError):
            raise UnsupportedError(f"{repo_id}: the Hub refuses the upload ({first_line(err)}); mend that") from None
        if mapped is None:
            raise
        raise mapped from None


def _check_upload(repo_id: str, files: dict[str, Any], remote: dict[str, Any]) -> None:
    """Compare what the Hub says it holds with the manifest: sizes, and SHA-256 where it keeps one (LFS files)."""
    for name, entry in files.items():
        there = remote.get(name)
        lfs = getattr(there, "lfs", None)
        if (
            there is None
            or (there.size is not None and there.size != entry["size"])
            or (lfs is not None and lfs.sha256 != entry["sha256"])
        ):
            raise VerificationError(f"{repo_id}/{name}: the Hub holds something else than was sent; push again")
