"""The learning rate of a run that names none: measured once, at the start, and kept by a run that resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rehead.cli import main
from rehead.recipes import uptrain
from rehead.recipes.training.checkpoints import work_path
from rehead.recipes.training.rate import HIGHEST, LOWEST, default_rate


@pytest.mark.parametrize(
    ("divergence", "rate"),
    [
        (None, 5e-4),
        (0.0, 2e-5),
        (0.01, 2e-5),
        (0.141, 1.8e-4),
        (0.165, 2.1e-4),
        (0.37, 4.6e-4),
        (0.4, 5e-4),
        (6.4, 5e-4),
    ],
)
def test_the_default_follows_the_distance(divergence: float | None, rate: float) -> None:
    assert default_rate(divergence) == rate


@given(st.floats(-1e-3, 100), st.floats(-1e-3, 100))
def test_a_nearer_student_never_gets_a_higher_rate(one: float, other: float) -> None:
    near, far = default_rate(min(one, other)), default_rate(max(one, other))
    assert LOWEST <= near <= far <= HIGHEST


def test_a_distance_that_is_no_number_is_far() -> None:
    assert default_rate(float("nan")) == default_rate(float("inf")) == HIGHEST


def _run(student: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the manifest records of a run, and its log."""
    uptrain(student, out, **options)
    lines = (out / "training-log.jsonl").read_text().splitlines()
    return json.loads((out / "rehead.json").read_text())["uptraining"], [json.loads(line) for line in lines]


def _notes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "note"]


def _none(tiny, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps that names no rate."""
    return {name: value for name, value in tiny.options(**changes).items() if name != "learning_rate"}


@pytest.mark.parametrize("loss", ["kd", "kd+0.1*ce", "js"])
def test_a_near_student_gets_a_small_rate_and_a_far_one_the_highest(tiny, tmp_path: Path, loss: str) -> None:
    far = shutil.copytree(tiny.student, tmp_path / "broken")
    weights = load_file(far / "model.safetensors")
    broken = {name: -weight if "down_proj" in name else weight for name, weight in weights.items()}
    save_file(broken, far / "model.safetensors", metadata={"format": "pt"})
    options = _none(tiny, teacher=str(tiny.teacher), loss=loss, tokens=1024, schedule="constant", warmup=0.0)
    for name, student in (("near", tiny.teacher), ("between", tiny.student), ("far", far)):
        facts, events = _run(student, tmp_path / name, **options)
        between = default_rate(facts["kl_at_start"])
        assert (LOWEST < between < HIGHEST) == (name == "between")
        rate = {"near": LOWEST, "between": between, "far": HIGHEST}[name]
        assert facts["options"]["learning_rate"] is None
        assert facts["learning_rate"] == rate
        assert {event["learning_rate"] for event in events if event["event"] == "step"} == {rate}
        (note,) = _notes(events)
        assert note["note"].startswith(f"learning rate {rate:g}, as the student starts at KL ")
        assert (note["learning_rate"], note["kl_at_start"]) == (rate, facts["kl_at_start"])
        assert f"learning rate {rate:g}" in (tmp_path / name / "README.md").read_text()


def test_it_is_measured_on_the_first_rows_to_train(tiny, tmp_path: Path) -> None:
    """With steps as long as what is measured, the first step's KL is the same number."""
    facts, events = _run(tiny.student, tmp_path / "out", **_none(tiny, batch_tokens=4096, tokens=8192))
    first = next(event for event in events if event["event"] == "step")
    assert facts["kl_at_start"] == pytest.approx(first["kl"], rel=1e-5)


@pytest.mark.parametrize("changes", [{"learning_rate": 3e-3}, {"loss": "ce"}, {"loss": "ce", "teacher": "yes"}])
def test_a_rate_that_is_named_and_cross_entropy_measure_nothing(tiny, tmp_path: Path, changes, monkeypatch) -> None:
    from rehead.recipes.training import rate

    monkeypatch.setattr(rate, "_divergence", lambda *_: pytest.fail("measured"))
    changes = {**changes, "teacher": str(tiny.teacher)} if "teacher" in changes else changes
    facts, events = _run(tiny.student, tmp_path / "out", **{**_none(tiny, tokens=1024), **changes})
    assert facts["learning_rate"] == changes.get("learning_rate", HIGHEST)
    assert facts["kl_at_start"] is None
    assert not _notes(events)


class _Stop(Exception):
    pass


def test_a_resumed_run_keeps_the_rate_of_its_first_start(tiny, tmp_path: Path, monkeypatch) -> None:
    from rehead.recipes.training import rate

    facts, events = _run(tiny.student, tmp_path / "whole", **_none(tiny))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise _Stop

    with pytest.raises(_Stop):
        uptrain(tiny.student, tmp_path / "out", **_none(tiny), on_event=stop)
    assert list(work_path(tmp_path / "out").glob("step-*"))
    with monkeypatch.context() as patch:
        patch.setattr(rate, "_divergence", lambda *_: pytest.fail("measured again"))
        again, log = _run(tiny.student, tmp_path / "out", **_none(tiny))
    names = ("learning_rate", "kl_at_start", "options", "steps")
    assert {name: again[name] for name in names} == {name: facts[name] for name in names}
    assert "resume" in [event["event"] for event in log]
    figures = ("step", "loss", "gradient_norm", "learning_rate")
    steps = [[tuple(e[f] for f in figures) for e in each if e["event"] == "step"] for each in (events, log)]
    assert steps[0] == steps[1]
    assert _notes(log) == _notes(events)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_the_command_tells_the_rate(tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--data", tiny.train, "--tokens", "1k", "--batch-tokens", "512", "--seq-length", "32", "--device", "cpu"]
    command = ["uptrain", str(tiny.student), str(tmp_path / "out"), *flags]

    def run(*more: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert not stop.value.code
        return capsys.readouterr()

    for more, words in (
        ((), "chosen at the start by the KL to the teacher, 0.0005 at most"),
        (("--lr", "1e-3"), "0.001"),
        (("--loss", "ce"), "0.0005"),
    ):
        estimate = json.loads(run("--dry-run", "--json", *more)[0])
        assert estimate["facts"]["learning rate"] == words
    told, err = run()
    facts = json.loads(run("--overwrite", "--json")[0])
    assert facts["learning_rate"] == default_rate(facts["kl_at_start"])
    assert f"note: learning rate {facts['learning_rate']:g}, as the student starts at KL" in err
    assert f"{facts['learning_rate']:g}, as the student started at KL {facts['kl_at_start']:.4g}" in told
