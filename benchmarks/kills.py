"""Kill commands at random moments and look at what is left: nothing half written, and the same command ends the work.

``convert``, ``convert`` with refit and fit, ``uptrain``, ``evaluate`` and ``run`` are started as a user starts them, so
a kill (SIGKILL to the whole process group) may fall into imports as well as into the last rename. After each:

* OUT is not there, or it is whole: every file has the hash in its manifest, every report and document can be read;
* beside it lies nothing but the working folders that the commands name;
* now and then the command runs to its end, and what it writes equals what an undisturbed run wrote.

Every second kill waits for the command to begin writing, which may be short beside imports and planning.

    python -m rehead.benchmarks.kills --kills 100 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rehead.checkpoints.manifest import verify_files
from rehead.checkpoints.smallfiles import MANIFEST_NAME
from rehead.recipes.pipeline.named_models import embedded_model

_RECIPE = """
name: kills
model: {model}
convert: {{num_key_value_heads: 2}}
uptrain: {{data: ["built-in:speeches#lines"], tokens: 2k, batch_tokens: 1024, seq_length: 128}}
evaluate: {{data: ["built-in:heldout"], tokens: 1k, window: 128, conventions: [disjoint]}}
"""
_CALIBRATION = ["--calibration-tokens", "1024", "--calibration-length", "128"]
_WORKING = (".rehead-staging", ".rehead-training", ".rehead-old", ".rehead-lock")


@dataclass
class Tally:
    """What became of one command's runs.

    Attributes:
        seconds: of the undisturbed run.
        killed: runs that died.
        ended: runs that were faster than their kill; all of them right.
        left: kills that left a working folder.
        finished: times that the command completed what kills had left, with the same result.
    """

    seconds: float = 0.0
    killed: int = 0
    ended: int = 0
    left: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)


def commands(home: Path, model: Path, student: Path) -> dict[str, list[str]]:
    """The arguments of each command; the output is ``home / "out"``."""
    out = str(home / "out")
    recipe = home / "recipe.yaml"
    recipe.write_text(_RECIPE.format(model=model))
    text = ["--data", "built-in:heldout", "--tokens", "1k", "--window", "128", "--conventions", "disjoint"]
    return {
        "convert": ["convert", str(model), out, "--kv-heads", "2", "--resume"],
        "fit": ["convert", str(model), out, "--kv-heads", "2", "--method", "svd", "--refit", "--fit", "2",
                *_CALIBRATION, "--resume"],
        "uptrain": ["uptrain", str(student), out, "--data", "built-in:speeches#lines", "--tokens", "4k",
                    "--batch-tokens", "1024", "--seq-length", "128", "--checkpoint-every", "1"],
        "evaluate": ["evaluate", str(student), "--baseline", str(model), *text, "--out", out],
        "run": ["run", str(recipe), "--out", out],
    }  # fmt: skip


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A command in a process group of its own."""
    with open(log, "wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "rehead.cli", *arguments, "--quiet"],
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def result(out: Path) -> str:
    """A hash of what a finished command wrote, without times: weights, configs and measured figures."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors" or path.name == "config.json":
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        elif path.name == "evaluation.json":
            table = json.loads(path.read_bytes())
            digest.update(json.dumps([table.get("perplexity"), table.get("divergence")], sort_keys=True).encode())
    return digest.hexdigest()


def faults(home: Path) -> list[str]:
    """What must not be in a folder in which a command was killed."""
    out, found = home / "out", []
    known = {"out", "recipe.yaml", "log", *(f".out{ending}" for ending in _WORKING)}
    found += [f"{name} is left beside OUT" for name in sorted({path.name for path in home.iterdir()} - known)]
    checkpoints = [path.parent for path in out.rglob(MANIFEST_NAME)] if out.is_dir() else []
    working = [part for part in out.rglob(".*") if part.name.endswith(_WORKING)] if out.is_dir() else []
    for folder in checkpoints:
        if not any(folder.is_relative_to(part) for part in working):
            try:
                verify_files(folder)
            except Exception as error:
                found.append(f"{folder.relative_to(home)}: {error}")
    for path in out.rglob("*.json") if out.is_dir() else ():
        if not any(path.is_relative_to(part) for part in working):
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                found.append(f"{path.relative_to(home)}: {error}")
    return found


def clear(home: Path) -> None:
    """Remove OUT and all working folders."""
    for path in home.iterdir():
        if path.name not in ("recipe.yaml", "log"):
            shutil.rmtree(path)


def hammer(home: Path, arguments: Sequence[str], kills: int, rng: random.Random) -> Tally:
    """Kill one command until it died ``kills`` times; every fourth kill is followed by a run to the end."""
    tally, log, out = Tally(), home / "log", home / "out"

    def finish() -> str | None:
        if start(arguments, log).wait():
            tally.faults.append(f"does not finish: {log.read_text(errors='replace')[-300:]}")
            return None
        left = [path.name for path in home.iterdir() if path.name.startswith(".")]
        left += [str(path.relative_to(home)) for path in out.rglob(".*.part")]
        tally.faults.extend(f"{name} is left after the end" for name in left)
        return result(out)

    begun = time.perf_counter()
    wanted = finish()
    tally.seconds = time.perf_counter() - begun
    clear(home)
    for trial in range(20 * kills):
        if tally.killed == kills:
            break
        run = start(arguments, log)
        deadline = time.monotonic() + rng.uniform(0, 1.05 * tally.seconds)
        written = (home / ".out.rehead-staging", home / ".out.rehead-training")
        stages = arguments[0] in ("convert", "uptrain")
        if stages and trial % 2 and not any(map(os.path.lexists, written)):  # every second kill falls into the writing
            deadline = time.monotonic() + 2 * tally.seconds
            while run.poll() is None and time.monotonic() < deadline and not any(map(os.path.lexists, written)):
                time.sleep(0.005)
            deadline = min(deadline, time.monotonic() + rng.uniform(0, 0.2 * tally.seconds))
        try:
            run.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        if run.returncode == 0:
            tally.ended += 1
        elif run.returncode == -signal.SIGKILL:
            tally.killed += 1
            tally.left += any(path.name.startswith(".out") for path in home.iterdir())
        else:
            tally.faults.append(f"exit code {run.returncode}: {log.read_text(errors='replace')[-300:]}")
            break
        tally.faults += faults(home)
        if run.returncode == 0 or tally.killed % 4 == 0:
            if run.returncode != 0 and not tally.faults:
                clear_if_complete(home)
                if finish() == wanted:
                    tally.finished += 1
                else:
                    tally.faults.append("another result after a kill")
            elif result(out) != wanted:
                tally.faults.append("another result")
            clear(home)
        if tally.faults:
            break
    return tally


def clear_if_complete(home: Path) -> None:
    """Remove an OUT that a killed run had completed, which another run would refuse to write over."""
    if (home / "out" / MANIFEST_NAME).is_file():
        shutil.rmtree(home / "out")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over all commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", help="only these: convert, fit, uptrain, evaluate, run")
    args = parser.parse_args(argv)
    model = embedded_model()
    failed = False
    with tempfile.TemporaryDirectory(prefix="rehead-kills-") as place:
        student = Path(place) / "student"
        if start(["convert", str(model), str(student), "--kv-heads", "2"], Path(place) / "log").wait():
            sys.exit((Path(place) / "log").read_text())
        names = args.commands or list(commands(Path(place), model, student))
        for index, name in enumerate(names):
            home = Path(place) / name
            home.mkdir()
            share = args.kills // len(names) + (index < args.kills % len(names))
            rng = random.Random(f"{args.seed} {name}")
            tally = hammer(home, commands(home, model, student)[name], share, rng)
            print(
                f"{name}: {tally.killed} kills (a whole run takes {tally.seconds:.1f} s), {tally.left} left a working "
                f"folder, {tally.ended} runs were faster, {tally.finished} finished with the same result; "
                f"{'; '.join(tally.faults) or 'nothing wrong'}",
                flush=True,
            )
            failed |= bool(tally.faults)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
