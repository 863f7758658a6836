"""A run that is stopped, however, and goes on ends with the bytes of one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rehead.checkpoints.stream import ResourceError
from rehead.errors import UsageError, VerificationError
from rehead.recipes import uptrain
from rehead.recipes.training import identity
from rehead.recipes.training.checkpoints import WorkFolder, work_path
from rehead.recipes.training.loop import Interrupted


def _weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def _steps(out: Path) -> list[tuple]:
    """Step events without what a clock decides."""
    lines = [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["gradient_norm"], e["learning_rate"]) for e in lines if e["event"] == "step"]


def _stopping_at(step: int, action):
    def listen(event: dict) -> None:
        if event["event"] == "step" and event["step"] == step:
            action()

    return listen


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    uptrain(tiny.student, out, **tiny.options())
    return out


def _command(tiny, out: Path, **changes) -> list[str]:
    flags = []
    for name, value in tiny.options(**changes).items():
        for one in value if isinstance(value, list) else [value]:
            flags += ["--" + name.replace("_", "-"), str(one)]
    return [sys.executable, "-m", "rehead.cli", "uptrain", str(tiny.student), str(out), *flags, "--quiet"]


def _killed(tiny, out: Path, step: int, wait: float, **changes) -> bool:
    """Start the command and SIGKILL it ``wait`` seconds after a step has been logged; False when it ended first."""
    log = work_path(out) / "training-log.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(_command(tiny, out, **changes), env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            reached = [json.loads(line).get("step", 0) for line in _lines(log)]
            if max(reached, default=-1) >= step:
                time.sleep(wait)
                process.kill()
            time.sleep(0.01)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read()
        return process.returncode != 0


def _lines(log: Path) -> list[bytes]:
    try:
        return log.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


def test_sigkill_and_resume_are_bit_identical(tiny, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _killed(tiny, out, step=3, wait=0.05)
    assert not out.exists()
    assert work_path(out).is_dir()
    events: list[dict] = []
    uptrain(tiny.student, out, **tiny.options(), on_event=events.append)
    assert events[0]["event"] == "resume"
    assert events[0]["step"] >= 2
    assert _weights(out) == _weights(whole)
    assert _steps(out) == _steps(whole)
    assert not work_path(out).exists()


@pytest.mark.slow
def test_ten_sigkills_at_random_moments(tiny, tmp_path: Path) -> None:
    longer = {"tokens": 64 * 512, "checkpoint_every": 3}
    uptrain(tiny.student, tmp_path / "whole", **tiny.options(**longer))
    draw, out, kills = random.Random(7), tmp_path / "out", 0
    while kills < 10:
        # Anywhere: while tokenising, in a step, in a checkpoint; from wherever the last kill has left it.
        ended = not _killed(tiny, out, step=draw.randint(0, 6) * kills, wait=draw.uniform(0, 0.3), **longer)
        kills += not ended
        if ended:
            assert _weights(out) == _weights(tmp_path / "whole")
            shutil.rmtree(out)
    uptrain(tiny.student, out, **tiny.options(**longer))
    assert _weights(out) == _weights(tmp_path / "whole")
    assert _steps(out) == _steps(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_a_checkpoint(tiny, whole: Path, tmp_path: Path, number: signal.Signals, capfd) -> None:
    out = tmp_path / "out"
    handler = signal.getsignal(number)
    stop = _stopping_at(3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="its checkpoint is kept") as found:
        uptrain(tiny.student, out, **tiny.options(checkpoint_every=0), on_event=stop)
    assert found.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert capfd.readouterr().err.count("stopping after this step, with a checkpoint") == 1
    assert signal.getsignal(number) is handler
    uptrain(tiny.student, out, **tiny.options(checkpoint_every=0))
    assert _weights(out) == _weights(whole)
    assert _steps(out) == _steps(whole)


class _Stop(Exception):
    pass


def _stopped(tiny, out: Path, step: int = 5, **changes) -> WorkFolder:
    """A run that an exception ended after ``step``, with checkpoints of steps 2 and 4."""

    def stop() -> None:
        raise _Stop

    with pytest.raises(_Stop):
        uptrain(tiny.student, out, **tiny.options(**changes), on_event=_stopping_at(step, stop))
    work = WorkFolder(out)
    assert work.steps() == [4, 2]
    work.close()
    return work


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_whose_hash_fails_gives_way_to_the_former(tiny, whole: Path, tmp_path: Path, file: str) -> None:
    out = tmp_path / "out"
    broken = _stopped(tiny, out).folder(4) / file
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    events: list[dict] = []
    uptrain(tiny.student, out, **tiny.options(), on_event=events.append)
    assert events[0] == {"event": "resume", "step": 2, "processes": 1, "device": "cpu"}
    assert events[1]["note"].startswith(f"not gone on from step-00000004: {file} ")
    assert _weights(out) == _weights(whole)


def test_a_teacher_that_changed_in_its_place_is_another(tiny, tmp_path: Path) -> None:
    teacher, out = shutil.copytree(tiny.teacher, tmp_path / "teacher"), tmp_path / "out"
    _stopped(tiny, out, teacher=str(teacher))
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="since the teacher checkpoint changed"):
        uptrain(tiny.student, out, **tiny.options(teacher=str(teacher)))


def test_a_refused_resume_names_what_differs(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "train.txt"
    shutil.copy(tiny.train.split("#")[0], data)
    out, options = tmp_path / "out", tiny.options(data=[f"{data}#lines"])
    _stopped(tiny, out, data=options["data"])
    with pytest.raises(UsageError, match=r"--lr \(0.01 then, 0.02 now\) changed; .* --resume never"):
        uptrain(tiny.student, out, **{**options, "learning_rate": 0.02})
    with pytest.raises(UsageError, match="the student checkpoint changed"):
        uptrain(tiny.teacher, out, teacher=str(tiny.teacher), **options)
    with monkeypatch.context() as patch:
        version = {**identity.code_version(), "torch": "1.0"}
        patch.setattr(identity, "code_version", lambda: version)
        with pytest.raises(UsageError, match=r"the code's version of torch \(.* then, 1.0 now\)"):
            uptrain(tiny.student, out, **options)
    text = data.read_text()
    data.write_text(text.replace("peace", "panic", 1))
    with pytest.raises(UsageError, match=r"the data \(other text or tokenizer\) changed"):
        uptrain(tiny.student, out, **options)
    # What was touched but reads the same is the same, and how a run is watched may change.
    data.write_text(text)
    events: list[dict] = []
    uptrain(tiny.student, out, **{**options, "keep": 1, "eval_data": [tiny.held]}, on_event=events.append)
    assert events[0]["event"] == "resume"


def test_rows_that_repeat_themselves_do_so_again_after_a_resume(tiny, tmp_path: Path) -> None:
    options = {"seq_length": 128, "packing": "joined", "repeats": 0.5}
    first: dict[float, float] = {}
    for repeats in (0.0, 0.5):
        done = tmp_path / f"whole-{repeats}"
        uptrain(tiny.student, done, **tiny.options(**{**options, "repeats": repeats}))
        first[repeats] = _steps(done)[0][1]
    assert abs(first[0.5] - first[0.0]) > 1e-3
    out = tmp_path / "out"
    _stopped(tiny, out, **options)
    with pytest.raises(UsageError, match=r"--repeats \(0.5 then, 0.25 now\) changed"):
        uptrain(tiny.student, out, **tiny.options(**{**options, "repeats": 0.25}))
    uptrain(tiny.student, out, **tiny.options(**options))
    assert _steps(out) == _steps(done)
    assert _weights(out) == _weights(done)
    assert json.loads((out / "rehead.json").read_text())["uptraining"]["options"]["repeats"] == 0.5


def test_resume_never_starts_anew(tiny, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _stopped(tiny, out, learning_rate=0.5)
    events: list[dict] = []
    uptrain(tiny.student, out, **tiny.options(), resume="never", on_event=events.append)
    assert events[0]["event"] == "start"
    assert _weights(out) == _weights(whole)


def test_older_checkpoints_are_pruned_after_the_new_one_is_there(tiny, tmp_path: Path) -> None:
    seen = []

    def look(event: dict) -> None:
        if event["event"] == "checkpoint":
            seen.append(sorted(path.name for path in work_path(tmp_path / "out").glob("step-*")))

    uptrain(tiny.student, tmp_path / "out", **tiny.options(keep=1), on_event=look)
    assert seen == [["step-00000002"], ["step-00000004"], ["step-00000006"]]


def test_a_loss_that_is_not_finite_stops_the_run(tiny, whole: Path, tmp_path: Path) -> None:
    from rehead.recipes.training.losses import loss, registry

    calls = {"left": 5}

    @loss("fifth_is_nan", "for this test", needs_teacher=False)
    def fifth_is_nan(batch):
        calls["left"] -= 1
        value = -batch.student_log_probs().gather(-1, batch.labels[:, None]).squeeze(-1)
        return value * (float("nan") if calls["left"] == 0 else 1.0)

    out, options = tmp_path / "out", tiny.options(loss="fifth_is_nan")
    try:
        with pytest.raises(VerificationError, match=r"the loss of step 5 .* the checkpoint of step 4 is kept"):
            uptrain(tiny.student, out, **options)
        assert not out.exists()
        work = WorkFolder(out)
        found, broken = work.newest()
        work.close()
        assert (found.step, broken) == (4, [])
        # Nothing but the loss was wrong, so the run goes on from there.
        uptrain(tiny.student, out, **options)
        steps = _steps(out)
        assert [step for step, *_ in steps] == list(range(1, 9))
        assert all(figure == figure for row in steps for figure in row)
    finally:
        registry.TERMS.remove("fifth_is_nan")


def test_a_step_that_is_not_waited_for_is_named_as_well(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from rehead.recipes.training import run
    from rehead.recipes.training.losses import loss, registry

    calls = {"left": 4}

    @loss("fourth_is_nan", "for this test", needs_teacher=False)
    def fourth_is_nan(batch):
        calls["left"] -= 1
        return batch.student_log_probs()[:, 0] * (float("nan") if calls["left"] == 0 else 1.0)

    monkeypatch.setattr(run, "Optimizer", partial(run.Optimizer, fused=True))
    try:
        options = tiny.options(loss="fourth_is_nan", checkpoint_every=3)
        with pytest.raises(VerificationError, match=r"the loss of step 4 .* the checkpoint of step 3 is kept"):
            uptrain(tiny.student, tmp_path / "out", **options)
        assert calls["left"] == -1  # the fifth had been launched
    finally:
        registry.TERMS.remove("fourth_is_nan")


def test_a_full_disk_leaves_the_former_checkpoint_whole(tiny, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: dict) -> None:
        if event["event"] == "checkpoint" and event["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))

    try:
        with pytest.raises(ResourceError, match=r"checkpoint of step 6: .*; the one of step 4 is whole") as found:
            uptrain(tiny.student, out, **tiny.options(), on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.exit_code == 3
    assert "\n" not in str(found.value)
    events: list[dict] = []
    uptrain(tiny.student, out, **tiny.options(), on_event=events.append)
    assert events[0]["step"] == 4
    assert _weights(out) == _weights(whole)


def test_two_runs_of_one_out(tiny, tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    with pytest.raises(UsageError, match="another run is training it"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options())
    work.close()
