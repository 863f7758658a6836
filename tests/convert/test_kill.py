"""SIGKILL at random moments: OUT is absent or complete, never half, and a resumed run ends with the same hashes.

A helper process imports everything once and forks for every `rehead convert`, so that the kills fall into the
conversion and not into the imports. The shards are of a few kilobytes, and each is synced and journalled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoints
from rehead.checkpoints.manifest import verify_files

HERE = Path(__file__).parents[1] / "helpers"

HELPER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import transformers.models.llama.modeling_llama
from rehead import cli
from rehead.convert import commands, execute
from rehead.convert import verify as verification

def convert(model, out, resume, overwrite):
    flags = ["--quiet", "--kv-heads", "1", "--max-shard-size", "40KB"]
    flags += ["--resume"] * resume + ["--overwrite"] * overwrite
    sys.argv = ["rehead", "convert", model, out, *flags]
    cli.main()

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            convert(**json.loads(line))
        except SystemExit as done:
            os._exit(done.code or 0)
        except BaseException as err:
            os.write(2, f"{type(err).__name__}: {err}\\n".encode())
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runner:
    """Runs conversions in forked children of the helper and kills them on request."""

    def __init__(self, log: Path) -> None:
        self._log = open(log, "wb")  # noqa: SIM115 - closed in close()
        self._helper = subprocess.Popen(
            [sys.executable, "-c", HELPER, str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(
        self,
        model: Path,
        out: Path,
        *,
        resume: bool,
        overwrite: bool = False,
        kill_after: float | None = None,
        once: Path | None = None,
    ) -> int:
        """Start one conversion, kill it so many seconds later, or after ``once`` exists, and return its wait status."""
        import json

        self._helper.stdin.write(
            json.dumps({"model": str(model), "out": str(out), "resume": resume, "overwrite": overwrite}) + "\n"
        )
        self._helper.stdin.flush()
        pid = int(self._helper.stdout.readline())
        if kill_after is not None:
            give_up = time.monotonic() + 60
            while once is not None and not once.exists() and not out.exists() and time.monotonic() < give_up:
                time.sleep(0.0005)
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        return int(self._helper.stdout.readline())

    def close(self) -> None:
        self._helper.stdin.close()
        self._helper.wait()
        self._log.close()


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def hammer(tmp_path: Path, kills: int, seed: int, layers: int) -> tuple[int, int]:
    """Kill until ``kills`` runs died; returns how many kills left a staging folder and how many found OUT complete."""
    rng = random.Random(seed)
    home = tmp_path / "home"
    home.mkdir()
    model = checkpoints.write_llama(home / "m", shards=3, layers=layers)
    runner = Runner(tmp_path / "log")
    out = home / "out"
    try:
        assert runner.run(model, out, resume=False) == 0
        whole = hashes(out)
        shutil.rmtree(out)
        start = time.perf_counter()
        assert runner.run(model, out, resume=False) == 0
        duration = time.perf_counter() - start
        assert hashes(out) == whole
        shutil.rmtree(out)

        died = staged = complete = 0
        staging = home / ".out.rehead-staging"
        for trial in range(20 * kills):
            if died == kills:
                break
            # Every second kill falls into the writing, which is short beside the planning of so small a model.
            once, share = (staging, 0.1) if trial % 2 and not staging.exists() else (None, 1.1)
            kill_after = rng.uniform(0, share * duration)
            status = runner.run(model, out, resume=rng.random() < 0.7, kill_after=kill_after, once=once)
            assert status in (0, signal.SIGKILL), (tmp_path / "log").read_text()
            died += status == signal.SIGKILL
            staged += staging.exists()
            left = {p.name for p in home.iterdir()}
            assert left <= {"m", "out", ".out.rehead-staging"}
            if out.exists():
                verify_files(out)
                assert hashes(out) == whole
                assert left == {"m", "out"}
                complete += 1
                shutil.rmtree(out)
        assert died == kills
        assert runner.run(model, out, resume=True) == 0
        assert hashes(out) == whole
        assert {p.name for p in home.iterdir()} == {"m", "out"}

        # Killed overwrites: the old output or the new, or (between the renames) an old one that the next run restores.
        old = {**whole}
        for _ in range(max(2, kills // 5)):
            status = runner.run(model, out, resume=False, overwrite=True, kill_after=rng.uniform(0, 1.1 * duration))
            assert status in (0, signal.SIGKILL), (tmp_path / "log").read_text()
            survivor = out if out.exists() else home / ".out.rehead-old"
            assert hashes(survivor) == old
        assert runner.run(model, out, resume=False, overwrite=True) == 0
        assert hashes(out) == whole
        assert {p.name for p in home.iterdir()} == {"m", "out"}
        return staged, complete
    finally:
        runner.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_eight_kills(tmp_path):
    staged, _ = hammer(tmp_path, kills=8, seed=1, layers=2)
    assert staged  # some kills fell into the writing, or the test shows nothing


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("seed", [2, 3])
def test_fifty_kills(tmp_path, seed):
    staged, _ = hammer(tmp_path, kills=50, seed=seed, layers=12)
    assert staged >= 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_is_killed_imports_included() -> None:
    """The benchmark's 100 kills, fewer: convert, fit, uptrain, evaluate and run, started as a user starts them."""
    line = [sys.executable, "-m", "rehead.benchmarks.kills", "--kills", "15", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing wrong") == 5
