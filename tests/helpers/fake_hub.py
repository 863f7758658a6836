"""A Hub in memory, in the place of ``huggingface_hub.HfApi``: what was asked of it, and what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub


class FakeHub:
    """Repositories by id, each with its files' bytes by name.

    Attributes:
        repositories: what there is.
        calls: names of the methods that were called, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.calls: list[str] = []

    def __call__(self, **_: Any) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, **_: Any) -> None:
        self.calls.append("create_repo")
        self.repositories.setdefault(repo_id, {})

    def model_info(self, repo_id: str, **_: Any) -> Any:
        self.calls.append("model_info")
        files = [
            SimpleNamespace(
                rfilename=name, size=len(data), lfs=SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            )
            for name, data in self.repositories[repo_id].items()
        ]
        return SimpleNamespace(siblings=files, sha="0" * 40)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> Any:
        self.calls.append("create_commit")
        for one in operations:
            if isinstance(one, huggingface_hub.CommitOperationAdd):
                self.repositories[repo_id][one.path_in_repo] = Path(str(one.path_or_fileobj)).read_bytes()
            else:
                del self.repositories[repo_id][one.path_in_repo]
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", oid="1" * 40)
