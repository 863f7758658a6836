"""Checkpoints on the Hugging Face Hub: headers are read at once, weights downloaded when one is needed.

Opening a repository downloads its file list, ``config.json``, the index and the shards' headers (by HTTP ranges), so
planning a 70B model costs well under a megabyte. Cache, endpoint and token are those of ``huggingface_hub``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rehead.checkpoints.contents import INDEX_FILE, MAX_CONFIG_BYTES, gather, parse_config, pick_layout
from rehead.checkpoints.hub_errors import retried, translated
from rehead.checkpoints.safetensors_io import Header, header_length, parse_header, parse_index, shown
from rehead.checkpoints.smallfiles import CONFIG_NAME
from rehead.checkpoints.source import LocalSource, Source
from rehead.errors import UnsupportedError, UsageError

__all__ = ["HubSource"]

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
        """Offline (``HF_HUB_OFFLINE``): open the repository's copy in the cache, which must be complete."""
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
            headers = pool.map(lambda shard: self._header(shard, guess[shard]), guess)
            return dict(zip(guess, headers, strict=True))

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
        """Bytes [start, end) of a remote file, and the file's size. Reads no more, even if the server sends more."""
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
        """A file's path in the local cache; downloads it if missing and resumes an interrupted download."""
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
