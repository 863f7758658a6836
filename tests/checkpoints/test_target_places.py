"""Where a checkpoint may be written, what replaces what, and verification of what is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from writing import convert, hashes, only

import checkpoints
from rehead.checkpoints import outputs, staging
from rehead.checkpoints.manifest import verify_files
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.target import Target
from rehead.errors import UsageError, VerificationError

HERE = Path(__file__).parents[1] / "helpers"


def test_places_where_out_may_not_be(tmp_path, model):
    def refused(out, words, **options):
        with pytest.raises(UsageError, match=words):
            convert(model, out, **options)

    before = hashes(model)
    refused(model, "source itself")
    refused(model, "source itself", overwrite=True)
    refused(model / "sub", "inside the source", overwrite=True)
    refused(tmp_path, "lies inside OUT", overwrite=True)
    (tmp_path / "link").symlink_to(model)
    refused(tmp_path / "link", "source itself", overwrite=True)
    refused(tmp_path / "link" / "sub", "inside the source", overwrite=True)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "already exists")
    refused(tmp_path / "file", "not a folder", overwrite=True)
    refused(tmp_path / "file" / "out", "is not a folder")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("meow")
    refused(other, "already exists")
    refused(other, "no checkpoint", overwrite=True)
    assert hashes(model) == before
    assert only(tmp_path) == {"m", "link", "file", "photos"}


@pytest.mark.parametrize("name", ["thesis.tex", "notes/chapter.md", "data.csv", "link"])
def test_nothing_foreign_is_lost_with_an_old_output(tmp_path, model, name):
    """A folder with a config.json is not for that alone a checkpoint's: what no checkpoint is made of stays."""
    convert(model, tmp_path / "out")
    place = tmp_path / "out" / name
    place.parent.mkdir(exist_ok=True)
    if name == "link":
        place.symlink_to(tmp_path / "m")
    else:
        place.write_text("three years of work")
    before = hashes(tmp_path / "out")
    with pytest.raises(UsageError, match=f"has {name}, which is not part of a checkpoint"):
        convert(model, tmp_path / "out", overwrite=True)
    assert hashes(tmp_path / "out") == before


def test_checkpoints_of_others_are_known_by_their_files(tmp_path, model):
    out = tmp_path / "out"
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
             "merges.txt", "README.md", "LICENSE", ".gitattributes", "chat_template.jinja", "modeling_own.py",
             "pytorch_model.bin",
             ".cache/huggingface/download/config.json.metadata", "generation_config.json"]  # fmt: skip
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    assert outputs.foreign_file(out) is None
    convert(model, out, overwrite=True)
    assert verify_files(out)


@pytest.mark.parametrize("swap", [True, False])
def test_overwriting_replaces_the_old_output_at_the_very_end(tmp_path, model, monkeypatch, swap):
    """In one step where the system can exchange two folders, in two renames elsewhere."""
    if not swap:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    out = convert(model, tmp_path / "out", "20KB")
    old = hashes(out)

    def plan(source):
        entries, fetch = checkpoints.pooled_plan(source)

        def check(name):
            assert hashes(out) == old  # untouched while the new one is made
            return fetch(name)

        return entries, check

    convert(model, out, "5GB", plan=plan, overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == 3
    verify_files(out)
    assert only(tmp_path) == {"m", "out"}
    with pytest.raises(UsageError, match="already exists"):
        convert(model, out)


def test_a_failed_overwrite_keeps_the_old_output(tmp_path, model):
    out = convert(model, tmp_path / "out")
    old = hashes(out)
    with pytest.raises(VerificationError):
        convert(model, out, plan=lambda s: (checkpoints.pooled_plan(s)[0], lambda n: torch.zeros(1)), overwrite=True)
    assert hashes(out) == old
    assert only(tmp_path) == {"m", "out"}


def test_an_overwrite_killed_between_its_two_renames_is_put_right_by_the_next_run(tmp_path, model):
    out = convert(model, tmp_path / "out")
    old = hashes(out)
    out.rename(tmp_path / ".out.rehead-old")
    with pytest.raises(UsageError, match="already exists"):
        convert(model, out)
    assert hashes(out) == old
    assert only(tmp_path) == {"m", "out"}


def test_missing_parents_are_made_and_unmade(tmp_path, model):
    deep = tmp_path / "a" / "b" / "out"
    with pytest.raises(VerificationError):
        convert(model, deep, plan=lambda s: (checkpoints.pooled_plan(s)[0], lambda n: torch.zeros(1)))
    assert only(tmp_path) == {"m"}
    verify_files(convert(model, deep))


def test_two_runs_at_once_do_not_meet(tmp_path, model):
    """The second is told which process is at work, and the first ends as if nothing had happened."""
    source = open_source(model)
    entries, fetch = checkpoints.pooled_plan(source)
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.target import Target
from rehead.errors import UsageError
source = open_source({str(model)!r})
try:
    Target({str(tmp_path / "out")!r}, source=source, fingerprint="x", resume=sys.argv[1] == "resume")
except UsageError as err:
    print(err)
"""
    with Target(tmp_path / "out", source=source, fingerprint="x") as target:
        target.write_weights(entries, fetch)
        for how in ("fresh", "resume"):
            said = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
            assert f"process {os.getpid()}" in said
        target.commit()
    verify_files(tmp_path / "out")
    assert only(tmp_path) == {"m", "out"}


def test_verification_names_what_is_wrong(tmp_path, model):
    out = convert(model, tmp_path / "out")
    assert verify_files(out)["files"]

    def fails(word: str, exception=VerificationError) -> None:
        with pytest.raises(exception, match=word) as caught:
            verify_files(out)
        assert "\n" not in str(caught.value)

    license_file = out / "LICENSE"
    text = license_file.read_bytes()
    license_file.write_bytes(text.swapcase())
    fails("LICENSE: its SHA-256")
    license_file.write_bytes(text + b"x")
    fails("LICENSE: 12 bytes where the manifest says 11")
    license_file.unlink()
    fails("'LICENSE' is missing")
    license_file.write_bytes(text)
    (out / "extra.bin").write_text("x")
    fails("'extra.bin' is not in the manifest")
    assert verify_files(out, allow_extra=True)
    (out / "extra.bin").unlink()
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 0x40
    shard.write_bytes(data)
    fails(f"{shard.name}: its SHA-256")
    data[-3] ^= 0x40
    shard.write_bytes(data)
    verify_files(out)
    (out / "rehead.json").write_text("{")
    fails("rehead.json")
    (out / "rehead.json").unlink()
    fails("no rehead.json", UsageError)
