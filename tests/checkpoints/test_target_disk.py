"""Disks that are full, too small or not ours, and the memory that writing takes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from writing import convert, hashes, only, stop_at

import checkpoints
from rehead.checkpoints import staging
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.staging import Staging
from rehead.checkpoints.target import ResourceError, Target

HERE = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("where", ["weights", "small"])
def test_a_file_size_limit_ends_in_one_line(tmp_path, model, where):
    """EFBIG met while writing: exit 3, one line, nothing left; with --resume the finished files stay."""
    (model / "tokenizer.json").write_bytes(b"x" * 40_000)
    code = f"""
import json, resource, sys
sys.path.insert(0, {str(HERE)!r})
from checkpoints import pooled_plan
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.target import Target
from rehead.errors import ReheadError
resource.setrlimit(resource.RLIMIT_FSIZE, ({30_000 if where == "weights" else 25_000}, resource.RLIM_INFINITY))
source = open_source({str(model)!r})
entries, fetch = pooled_plan(source)
try:
    with Target({str(tmp_path / "out")!r}, source=source, fingerprint="x") as t:
        t.write_weights(entries, fetch, {"5GB" if where == "weights" else "15KB"!r})
        t.copy_small_files()
        t.commit()
except ReheadError as err:
    print(err.exit_code, err)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("3 ")
    assert said.count("\n") == 1
    assert ("safetensors" if where == "weights" else "tokenizer.json") in said
    assert "size limit" in said
    assert only(tmp_path) == {"m"}


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, model, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs .* GB and the disk has") as caught:
        convert(model, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert only(tmp_path) == {"m"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_fills_up_during_a_run(tmp_path, model, monkeypatch, resume):
    """ENOSPC out of the writing thread reaches the caller as one line; a resumable run keeps what it has."""
    real, written = os.pwrite, []

    def full(fd, data, offset):
        if threading.current_thread().name == "rehead-write":
            written.append(len(data))
            if sum(written) > 60_000:
                raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    whole = hashes(convert(model, tmp_path / "whole", "20KB"))
    written.clear()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        convert(model, tmp_path / "out", "20KB", resume=resume)
    monkeypatch.undo()
    assert only(tmp_path) == {"m", "whole"} | ({".out.rehead-staging"} if resume else set())
    assert hashes(convert(model, tmp_path / "out", "20KB", resume=resume)) == whole


@pytest.mark.skipif(os.listdir not in os.supports_fd, reason="reads folders by their descriptors")
@pytest.mark.parametrize("overwrite", [False, True])
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, model, monkeypatch, overwrite):
    """A power cut leaves a whole OUT or none: files, then folders, are synced in their last state before the rename."""
    out, source = tmp_path / "new" / "er" / "out", open_source(model)
    if overwrite:
        convert(model, out)
    synced: dict[int, object] = {}
    real_sync, real_record, named = os.fsync, Staging.record, []

    def fsync(fd):
        real_sync(fd)
        status = os.fstat(fd)
        synced[status.st_ino] = set(os.listdir(fd)) if stat.S_ISDIR(status.st_mode) else status.st_size

    def record(staging, name, size, sha256):
        assert synced[(staging.path / name).stat().st_ino] == size  # what the journal names is there
        real_record(staging, name, size, sha256)
        assert synced[(staging.private / "journal.jsonl").stat().st_ino] > 0

    def noticing(function):
        return lambda *args: (named.append(dict(synced)), function(*args))[1]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Staging, "record", record)
    monkeypatch.setattr(os, "rename", noticing(os.rename))
    monkeypatch.setattr(staging, "exchange", noticing(staging.exchange))
    with Target(out, source=source, fingerprint="x", overwrite=overwrite) as target:
        target.write_weights(*checkpoints.pooled_plan(source), "20KB")
        target.write_text("sub/deep/notes.txt", "x")
        target.commit()
    for path in [out, *out.rglob("*")]:
        last = set(os.listdir(path)) if path.is_dir() else path.stat().st_size
        assert named[0][path.stat().st_ino] == last, path.relative_to(tmp_path)
    for path in (out, *([] if overwrite else [out.parent, out.parent.parent])):
        assert path.name in synced[path.parent.stat().st_ino]


def test_a_callers_own_full_disk_is_one_line_too(tmp_path, model):
    with pytest.raises(ResourceError, match="the disk is full"):
        convert(model, tmp_path / "out", plan=stop_at(1, OSError(28, "No space left on device")))
    assert only(tmp_path) == {"m"}


def test_a_folder_that_may_not_be_written(tmp_path, model):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="permission denied"):
        convert(model, locked / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's figures from /proc")
def test_memory_does_not_follow_the_size_of_the_model(tmp_path):
    """Copying 400 MB grows the process by less than 60 MB, most of which are the buffers."""
    folder = tmp_path / "m"
    folder.mkdir()
    piece = torch.zeros(25_000_000, dtype=torch.bfloat16)
    checkpoints.save(folder / "model.safetensors", {f"t{i}": piece for i in range(8)})
    (folder / "config.json").write_text("{}")
    code = f"""
import torch
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.target import OutputTensor, Target
def peak():  # the kernel's high-water mark of this very program; ru_maxrss would start from the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
source = open_source({str(folder)!r})
entries = [OutputTensor(t.name, t.dtype, t.shape, origin=t.name) for t in source.tensors.values()]
before = peak()
with Target({str(tmp_path / "out")!r}, source=source, fingerprint="x") as target:
    target.write_weights(entries, None)
    target.commit()
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 10e6 < grown < 60e6
