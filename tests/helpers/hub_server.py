"""A small Hub on 127.0.0.1, for driving the real ``huggingface_hub`` client without a network.

It speaks the part of the protocol that reading and pushing a model need (model info, file resolution with redirects and
ranges, repository creation, pre-upload, LFS batch and upload, commits), counts every byte it sends, fails when told to:
gated and forbidden repositories, connections cut in the middle of a file, connections refused on upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class Blob:
    """A file's content: bytes, or a file on disk that is never loaded whole."""

    data: bytes | None = None
    path: Path | None = None
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.data) if self.data is not None else self.path.stat().st_size  # type: ignore[union-attr]

    def read(self, start: int, length: int) -> bytes:
        if self.data is not None:
            return self.data[start : start + length]
        with open(self.path, "rb") as f:  # type: ignore[arg-type]
            f.seek(start)
            return f.read(length)

    @property
    def oid(self) -> str:
        """Git's hash for small files, SHA-256 for LFS ones, as the Hub's etags have it."""
        if self.size > 1 << 28:  # a stand-in for a huge file, which nobody downloads
            return hashlib.sha256(str(self.path).encode()).hexdigest()
        digest = hashlib.sha256() if self.lfs else hashlib.sha1(b"blob %d\0" % self.size)
        for at in range(0, self.size, 1 << 20):
            digest.update(self.read(at, 1 << 20))
        return digest.hexdigest()


@dataclass
class Repo:
    """Commits oldest first, each the whole tree; ``main`` is the last."""

    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    gated: int = 0  # answer files with this status
    private: bool = False

    def commit(self, tree: Mapping[str, Blob]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}{id(self)}".encode()).hexdigest()
        self.commits.append((sha, dict(tree)))
        self.refs["main"] = sha
        return sha

    def tree(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        wanted = self.refs.get(revision, revision)
        return next((c for c in reversed(self.commits) if c[0] == wanted), None)


class HubServer:
    """Start with ``with HubServer() as hub``; give its ``url`` to the client as ``HF_ENDPOINT``.

    Attributes:
        sent: bytes of bodies sent so far.
        requests: (method, path, status, bytes sent) of every request.
        cut: path suffix to [byte offset from which on the connection is cut, how many more times].
        refuse_uploads: answer uploads by cutting the connection.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.sent = 0
        self.requests: list[tuple[str, str, int, int]] = []
        self.cut: dict[str, list[int]] = {}
        self.refuse_uploads = False
        self.ignore_ranges = False
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_folder(self, repo_id: str, folder: Path, **options: Any) -> str:
        """Put a folder on the Hub as one more commit of ``repo_id`` and return the commit's hash."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        tree = {
            p.relative_to(folder).as_posix(): Blob(path=p, lfs=p.suffix in _LFS_SUFFIXES)
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        return repo.commit(tree)

    def reset_counts(self) -> None:
        with self.lock:
            self.sent = 0
            self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # ---- answers

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and body:
            self.wfile.write(body)
        self._log(status, len(body) if self.command != "HEAD" else 0)

    def _log(self, status: int, sent: int) -> None:
        with self.hub.lock:
            self.hub.sent += sent
            self.hub.requests.append((self.command, self.path, status, sent))

    def _json(self, table: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(table).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message or code}
        self._answer(status, json.dumps({"error": message or code}).encode(), headers)

    def _drop(self) -> None:
        self._log(0, 0)
        self.close_connection = True
        self.connection.shutdown(2)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            out = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ---- reading

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        query = parse_qs(urlsplit(self.path).query)
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            if tree := re.fullmatch(r"(.+?)/tree/([^/]+)(?:/.*)?", match[1]):
                return self._tree(tree[1], tree[2])
            return self._info(match[1], match[2] or "main", "blobs" in query)
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        if match := re.fullmatch(r"/cdn/(.+?)/at/([^/]+)/(.+)", path):
            found = self._find(match[1], match[2])
            return self._file(found[1][match[3]], found[0], match[3]) if found else None
        return self._error(404, "NotFound")

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]] | None:
        repo = self.hub.repos.get(repo_id)
        allowed = repo is not None and (not repo.private or self.headers.get("authorization") == f"Bearer {TOKEN}")
        if repo is None or not allowed:
            self._error(401, "RepoNotFound", "Invalid username or password.")  # what the Hub says to strangers
            return None
        found = repo.tree(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _info(self, repo_id: str, revision: str, blobs: bool) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        siblings = []
        for name, blob in found[1].items():
            entry: dict[str, Any] = {"rfilename": name}
            if blobs:
                entry |= {"size": blob.size, "blobId": blob.oid[:40]}
                if blob.lfs:
                    entry["lfs"] = {"sha256": blob.oid, "size": blob.size, "pointerSize": 134}
            siblings.append(entry)
        self._json(
            {"id": repo_id, "modelId": repo_id, "sha": found[0], "siblings": siblings, "tags": [], "private": False}
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision)
        if found is not None:
            rows = []
            for name, blob in found[1].items():
                row: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid[:40]}
                if blob.lfs:
                    row["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 134}
                rows.append(row)
            self._json(rows)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        repo = self.hub.repos[repo_id]
        if repo.gated:
            return self._error(repo.gated, "GatedRepo", f"Access to model {repo_id} is restricted.")
        blob = found[1].get(name)
        if blob is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        if blob.lfs:  # as on the Hub, large files are served by a content network elsewhere
            headers = {
                "Location": f"{self.hub.url}/cdn/{repo_id}/at/{found[0]}/{name}",
                "X-Linked-Etag": f'"{blob.oid}"',
                "X-Linked-Size": str(blob.size),
                "X-Repo-Commit": found[0],
            }
            return self._answer(302, b"", headers)
        return self._file(blob, found[0], name)

    def _file(self, blob: Blob, commit: str, name: str) -> None:
        start, end, status = 0, blob.size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if match and not self.hub.ignore_ranges:
            start, status = int(match[1]), 206
            end = min(end, int(match[2]) + 1) if match[2] else end
            if start >= blob.size:
                return self._answer(416, b"", {"Content-Range": f"bytes */{blob.size}"})
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{blob.oid}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{blob.size}")
        self.end_headers()
        if self.command == "HEAD":
            return self._log(status, 0)
        at = start
        while at < end:
            cut = next((c for suffix, c in self.hub.cut.items() if name.endswith(suffix) and c[1] > 0), None)
            if cut and at >= cut[0]:
                cut[1] -= 1
                self._log(status, at - start)
                self.close_connection = True
                self.connection.shutdown(2)
                return None
            stop = min(end, at + (1 << 16), cut[0] if cut else end)
            try:
                self.wfile.write(blob.read(at, stop - at))
            except OSError:  # the client has had enough
                self.close_connection = True
                break
            at = stop
        return self._log(status, at - start)

    # ---- writing

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        raw = self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(raw))
        if match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(_LFS_SUFFIXES) else "regular",
                 "shouldIgnore": False}
                for f in json.loads(raw)["files"]
            ]  # fmt: skip
            return self._json({"files": files})
        if re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(raw))
        if match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            return self._commit(match[1], raw)
        return self._error(404, "NotFound")

    def _create(self, table: dict[str, Any]) -> None:
        repo_id = f"{table['organization']}/{table['name']}" if table.get("organization") else table["name"]
        if repo_id.startswith("forbidden/"):
            return self._error(403, "Forbidden", "You don't have the rights to create a model there")
        if repo_id in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        repo = self.hub.repos[repo_id] = Repo(private=bool(table.get("private")))
        repo.commit({".gitattributes": Blob(data=b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _batch(self, table: dict[str, Any]) -> None:
        objects = []
        for wanted in table["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        if self.hub.refuse_uploads:
            return self._drop()
        raw = self._body()
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(raw).hexdigest() != oid:
            return self._error(400, "BadHash", "content does not match its oid")
        self.hub.lfs[oid] = raw
        return self._answer(200)

    def _commit(self, repo_id: str, raw: bytes) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return self._error(404, "RepoNotFound")
        tree = dict(repo.commits[-1][1])
        for line in raw.splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "header" and value.get("parentCommit") not in (None, repo.commits[-1][0]):
                return self._error(412, "PreconditionFailed", "A commit has happened since.")
            if record["key"] == "file":
                tree[value["path"]] = Blob(data=base64.b64decode(value["content"]))
            elif record["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self._error(400, "MissingLfs", f"LFS object {value['oid']} was never uploaded")
                tree[value["path"]] = Blob(data=self.hub.lfs[value["oid"]], lfs=True)
            elif record["key"] == "deletedFile":
                tree.pop(value["path"], None)
        sha = repo.commit(tree)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})
