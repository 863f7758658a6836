"""``rehead uptrain`` on the command line: facts, errors in one line, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rehead.cli import main


def _run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def _flags(tiny) -> list[str]:
    return ["--data", tiny.train, "--tokens", "2k", "--batch-tokens", "512", "--seq-length", "32", "--device", "cpu"]


def test_it_trains_and_tells(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["rehead", "uptrain", str(tiny.student), out, "--resume=auto"])
    extra = ["--eval-data", tiny.held, "--lr-for", "k_proj=2", "--betas", "0.9", "0.99", "--train", "attention"]
    code, told, err = _run(capsys, "uptrain", str(tiny.student), out, *_flags(tiny), *extra)
    assert code == 0
    assert told.startswith(f"wrote {out}\n")
    for words in ("4 of 512 tokens: 2,048", "tokens/s", "held.txt#lines", "kl ", "peak memory"):
        assert words in told
    assert "step 4" in err
    recorded = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert recorded["command"] == f"rehead uptrain {tiny.student} {out}"
    assert recorded["uptraining"]["options"]["learning_rates"] == {"k_proj": 2.0}
    assert recorded["uptraining"]["options"]["betas"] == [0.9, 0.99]


def test_json_is_the_same_facts_and_quiet_is_silent(tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ("uptrain", str(tiny.student), str(tmp_path / "out"), *_flags(tiny))
    code, told, _ = _run(capsys, *arguments, "--json")
    facts = json.loads(told)
    assert (code, facts["tokens"], facts["steps"]) == (0, 2048, 4)
    code, told, err = _run(capsys, *arguments, "--overwrite", "--resume", "never", "--quiet")
    assert (code, told, err) == (0, "", "")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--data", "missing.txt"], 2, "no such file"),
        (["--tokens", "8X"], 2, "--tokens '8X'"),
        (["--loss", "kdd"], 2, "did you mean 'kd'"),
        (["--seq-length", "1M"], 2, "too short"),
        (["--schedule", "cosin"], 2, "--schedule 'cosin'"),
        (["--train", "atention"], 2, "did you mean 'attention'"),
        (["--attention", "bogus"], 2, "choose auto, tiled, sdpa or eager"),
        (["--resume", "yes"], 2, "choose auto or never"),
        (["--tracker", "tensorbord"], 2, "did you mean 'tensorboard'"),
        (["--eval-data", "missing.txt"], 2, "--eval-data missing.txt"),
        (["--device", "cuda:99"], 2, "--device cuda:99"),
        (["--lr-for", "typo=2"], 2, "--lr-for typo"),
        (["--loss", "ce", "--lr", "1e30", "--clip", "0"], 4, "is not finite"),
    ],
)
def test_mistakes_take_one_line(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, changes, code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = _run(capsys, "uptrain", str(tiny.student), "out", *_flags(tiny), *changes)
    assert found[0] == code
    assert words in found[2]
    lines = [line for line in found[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in found[2]
    assert not (tmp_path / "out").exists()


def test_listing_commands_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, rehead.recipes.training.commands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
