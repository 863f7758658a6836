"""Processes that a recipe launched end with the one that launched them, and keep what they have done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rehead.recipes.pipeline.launched import ASKED, HELD


def gone(pattern: str, seconds: float) -> bool:
    """Whether no process has the pattern in its command line, soon enough."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode:
            return True
        time.sleep(0.2)
    return False


def begun(home: Path, tokens: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A recipe's run in two processes that has kept its first checkpoint, and the command's arguments."""
    path = home / "recipe.yaml"
    path.write_text(path.read_text() + "launch: {processes: 2, config: ddp}\ncontrol: false\n")
    more = ["--set", f"uptrain.tokens={tokens}", "--set", "uptrain.checkpoint_every=5"]
    arguments = ["run", str(path), "--quiet", *more]
    command = [sys.executable, "-m", "rehead.cli", *arguments]
    main = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list((home / "out").glob(".uptrain-*/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    return main, arguments


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
WATCHED = """
import signal, sys, time
from pathlib import Path
from rehead.recipes.pipeline.launched import end_with
signal.signal(signal.SIGINT, lambda *_: print("asked", flush=True))
end_with(Path(sys.argv[1]))
time.sleep(60)
"""


def test_a_launched_process_ends_with_the_one_that_launched_it(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / HELD)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    second = subprocess.Popen([sys.executable, "-c", WATCHED, str(tmp_path)], stdout=subprocess.PIPE)
    assert second.stdout is not None
    (tmp_path / ASKED).write_text(str(int(signal.SIGINT)))
    assert second.stdout.readline() == b"asked\n"
    assert second.poll() is None
    first.kill()  # and nobody waits for it, so its number stays taken
    assert second.wait(timeout=30) == -signal.SIGTERM
    first.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_main_process_keeps_a_checkpoint(home, number) -> None:
    main, _ = begun(home, "200k")
    os.killpg(main.pid, number)
    _, err = main.communicate(timeout=60)
    assert main.returncode == 128 + number
    assert len(err.strip().splitlines()) == 1
    assert "its checkpoint is kept" in err
    assert gone("rehead.recipes.pipeline.launched", 1)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_resumed(run, home) -> None:
    main, arguments = begun(home, "20k")
    assert main.poll() is None
    os.kill(main.pid, signal.SIGKILL)
    main.communicate()
    assert gone("rehead.recipes.pipeline.launched", 60)
    kept = [int(step.name[5:]) for step in (home / "out").glob(".uptrain-*/step-*")]
    code, _, err = run(*arguments)
    assert code == 0, err
    log = next((home / "out").glob("uptrain-*")) / "training-log.jsonl"
    events = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps = [event["step"] for event in events if "loss" in event and "step" in event]
    assert kept
    assert steps == sorted(set(steps))
    assert steps[-1] > max(kept)
