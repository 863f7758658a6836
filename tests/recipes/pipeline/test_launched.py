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


def gone(pattern: str, seconds: float) -> bool:
    """Whether no process has the pattern in its command line, soon enough."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode:
            return True
        time.sleep(0.2)
    return False


def test_a_launched_process_ends_with_the_one_that_launched_it() -> None:
    first = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"import time; from rehead.recipes.pipeline.launched import end_with; end_with({first.pid}); time.sleep(60)"
    second = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.5)
    assert second.poll() is None
    first.kill()
    first.wait()
    assert second.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_resumed(run, home) -> None:
    path = home / "recipe.yaml"
    path.write_text(path.read_text() + "launch: {processes: 2, config: ddp}\ncontrol: false\n")
    more = ["--set", "uptrain.tokens=20k", "--set", "uptrain.checkpoint_every=5"]
    command = [sys.executable, "-m", "rehead.cli", "run", str(path), "--quiet", *more]
    main = subprocess.Popen(command, start_new_session=True)
    until = time.monotonic() + 120
    while not list((home / "out").glob(".uptrain-*/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert main.poll() is None
    os.kill(main.pid, signal.SIGKILL)
    main.wait()
    assert gone("rehead.recipes.pipeline.launched", 60)
    kept = [int(step.name[5:]) for step in (home / "out").glob(".uptrain-*/step-*")]
    code, _, err = run("run", path, "--quiet", *more)
    assert code == 0, err
    log = next((home / "out").glob("uptrain-*")) / "training-log.jsonl"
    events = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps = [event["step"] for event in events if "loss" in event and "step" in event]
    assert kept
    assert steps == sorted(set(steps))
    assert steps[-1] > max(kept)
