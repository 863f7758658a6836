"""The smallest user of Target, shared by its tests: a plain mean pooling, hashes, and a run stopped half-way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import checkpoints
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.target import Target


def convert(folder: Path, out: Path, size: str | int = "5GB", plan=None, **options) -> Path:
    """A plain mean pooling through Target, as the smallest possible user of it."""
    source = open_source(folder)
    entries, fetch = plan(source) if plan else checkpoints.pooled_plan(source)
    with Target(out, source=source, **{"fingerprint": "x", **options}) as target:
        target.write_weights(entries, fetch, size)
        target.copy_small_files()
        target.write_text("config.json", json.dumps({**source.config, "num_key_value_heads": 1}))
        target.commit({"method": "mean"})
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def expected_tensors(**sizes) -> dict[str, torch.Tensor]:
    out = {}
    for name, w in checkpoints.llama_tensors(**sizes).items():
        pooled = ".k_proj." in name or ".v_proj." in name
        out[name] = w.view(1, -1, 16, w.shape[1]).float().mean(1).reshape(16, -1).to(w.dtype) if pooled else w
    return out


def only(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


class Stop(BaseException):
    """Stands for anything that ends a run from outside."""


def stop_at(count: int, error: BaseException):
    """A plan whose fetch raises on its n-th call."""

    def plan(source):
        entries, fetch = checkpoints.pooled_plan(source)
        calls = []

        def fetch_or_stop(name):
            calls.append(name)
            if len(calls) == count:
                raise error
            return fetch(name)

        return entries, fetch_or_stop

    return plan
