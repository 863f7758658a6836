"""Errors of the Hub: which requests to retry, and a one-line error for each of ``huggingface_hub``'s exceptions."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rehead.checkpoints.stream import ResourceError, is_full, write_error
from rehead.errors import ReheadError, UnsupportedError, UsageError, first_line

_T = TypeVar("_T")
_ATTEMPTS = 4
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
_WAIT_S = 0.5


def retried(call: Callable[[], _T], attempts: int = _ATTEMPTS) -> _T:
    """The result of ``call()``, retried after dropped connections only."""
    for attempt in range(attempts):
        try:
            return call()
        except Exception as err:
            if attempt == attempts - 1 or not _is_dropped(err):
                raise
            time.sleep(_WAIT_S * 2**attempt)
    raise AssertionError


def chain(err: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, eight at most."""
    link: BaseException | None = err
    for _ in range(8):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _is_dropped(err: BaseException) -> bool:
    """Whether a connection was lost or refused; False if the server answered with a refusal."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(err, ReheadError):
        return False
    if isinstance(err, HfHubHTTPError):
        return err.response is not None and err.response.status_code >= 500
    for link in chain(err):
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
            # The user may have mistyped a local folder's name, which a message about the network would hide.
            raise ResourceError(f"{mapped}; no local folder has this name") from None
        raise mapped from None


def hub_error(err: BaseException, repo_id: str, revision: str | None, file: str | None = None) -> ReheadError | None:
    """The one-line error for an exception of ``huggingface_hub``; None if it does not come from the Hub."""
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
    full = next((e for e in chain(err) if isinstance(e, OSError) and is_full(e)), None)
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
