"""``rehead uptrain --push-to-hub`` on a Hub in memory, and a card that says nothing of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub

from rehead.checkpoints.manifest import MANIFEST_NAME
from rehead.checkpoints.markdown import without_folders


def test_the_result_is_pushed_when_asked_for(tiny, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    out = tmp_path / "out"
    words = ["uptrain", str(tiny.student), str(out), "--data", tiny.train, "--tokens", "1k", "--batch-tokens", "512",
             "--seq-length", "32", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["rehead", *words, "--push-to-hub", "me/model"])
    code, told, err = run(*words, "--push-to-hub", "me/model", "--json")
    assert code == 0, err
    assert json.loads(told)["pushed"] == "https://hub/me/model/commit/1"
    table = json.loads((out / MANIFEST_NAME).read_text())
    assert {*table["files"], MANIFEST_NAME} == hub.repositories["me/model"].keys()
    card = hub.repositories["me/model"]["README.md"].decode()
    assert "## Uptraining" in card
    assert "taught by `teacher`" in card
    assert "--push-to-hub" not in card
    for folder in (tmp_path, tiny.student.parent):
        assert str(folder) not in card
    calls = len(hub.calls)
    assert run(*words, "--overwrite", "--resume", "never")[0] == 0
    assert len(hub.calls) == calls


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("rehead convert /home/me/models/llama out --kv-heads 1", "rehead convert llama out --kv-heads 1"),
        ("rehead convert '/home/me/my models/m' ../x/o", "rehead convert 'm' o"),
        ("rehead plan m --calibration=/a/b.txt,~/c/d.txt", "rehead plan m --calibration=b.txt,d.txt"),
        ("owner/name ./out/x https://host/a/b a/b/c 1/2", "owner/name x https://host/a/b a/b/c 1/2"),
        ("--data /d/t.jsonl#chars=0:5", "--data t.jsonl#chars=0:5"),
        ("convert(model='/a/b')", "convert(model='b')"),
    ],
)
def test_paths_become_names(text: str, plain: str) -> None:
    assert without_folders(text) == plain
