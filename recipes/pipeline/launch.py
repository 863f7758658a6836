"""An uptraining in several processes: ``accelerate launch`` started, watched, asked to stop, its failure explained."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.errors import EXIT_INTERRUPTED, QualityError, ReheadError, UnsupportedError, UsageError, VerificationError
from rehead.recipes.pipeline.launched import ASKED, ERROR, HELD, STARTED
from rehead.recipes.pipeline.load import parse_yaml, text_of


def launch(arguments: dict[str, Any], processes: int, config: str, quiet: bool) -> None:
    """Uptrain in processes of their own, by a small module that reads its arguments from a file.

    The first SIGINT or SIGTERM asks them for a checkpoint and waits for it; the second ends all at once.

    Args:
        arguments: of :func:`rehead.recipes.uptrain`, as JSON types.
        processes: how many.
        config: as :func:`accelerate_config`.
        quiet: whether they should say nothing.

    Raises:
        UsageError: accelerate cannot start them with that config.
        UnsupportedError: one of them was killed or broke.
        Interrupted: a signal came.
        ReheadError: what the uptraining met.
    """
    from filelock import FileLock

    from rehead.recipes.training.loop import Interrupted, StopRequests

    file = accelerate_config(config)
    with (
        tempfile.TemporaryDirectory() as name,
        FileLock(Path(name) / HELD),
        # Their words go to a file: a pipe that nobody empties would stop them.
        open(Path(name) / "words", "w+", encoding="utf-8", errors="replace") as words,
        StopRequests() as requests,
    ):
        folder = Path(name)
        path = folder / "arguments.json"
        path.write_text(json.dumps({**arguments, "processes": processes}), encoding="utf-8")
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--num_processes", str(processes), "-m", "rehead.recipes.pipeline.launched", str(path),
            *(["--quiet"] if quiet else []),
        ]  # fmt: skip
        # In a session of its own, since Ctrl-C at a terminal would reach the launcher too, which ends the others by a
        # second signal: that is one that acts at once.
        launcher = subprocess.Popen(command, stderr=words if quiet else None, start_new_session=True)
        try:
            while launcher.poll() is None:
                if requests.number and not (folder / STARTED).exists():
                    break  # there is nobody to ask, and nothing to keep
                if requests.number and not (folder / ASKED).exists():
                    write_file(folder / ASKED, str(requests.number))
                time.sleep(0.1)
        finally:
            launcher.kill()
            launcher.wait()
        error = folder / ERROR
        found = json.loads(error.read_text(encoding="utf-8")) if error.is_file() else None
        if requests.number and (found is None or found["exit_code"] < EXIT_INTERRUPTED):
            raise Interrupted(
                "interrupted; the same command resumes from the newest checkpoint if there is one", requests.number
            )
        if found is not None:
            raise error_of(found["error"], found["exit_code"])
        if launcher.returncode:
            words.seek(0)
            reason = why(launcher.returncode, words.read())
            if launcher.returncode > 0 and not (folder / STARTED).exists():
                raise UsageError(
                    f"launch.config {config}: accelerate could not start {processes} processes with it ({reason}); "
                    "fix it, or give ddp or fsdp2"
                )
            raise UnsupportedError(
                f"accelerate launch of {processes} processes: {reason}; run the recipe again to resume from the newest "
                "checkpoint"
            )


def why(code: int, words: str) -> str:
    """Why launched processes ended early, in a few words.

    Args:
        code: the launcher's, negative for a signal.
        words: what all of them wrote to standard error, the report with which torch closes included.
    """
    if code < 0:
        return f"the launcher was killed by {signal.Signals(-code).name}"
    _, _, cause = words.rpartition("Root Cause")
    killed = re.search(r"Signal \d+ \((SIG\w+)\) received", cause)
    if killed:
        return f"one was killed by {killed[1]}"
    said = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in words.splitlines()]
    raised = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line) and "ChildFailed" not in line]
    return (raised or [f"one ended with code {code}; see its output"])[-1]


def error_of(message: str, exit_code: int) -> ReheadError:
    """An error of the class that an exit code stands for."""
    if exit_code >= 128:
        from rehead.recipes.training.loop import Interrupted

        return Interrupted(message, 2 if exit_code == EXIT_INTERRUPTED else exit_code - 128)
    kinds = {kind.exit_code: kind for kind in (UsageError, VerificationError, QualityError)}
    return kinds.get(exit_code, UnsupportedError)(message)


def accelerate_config(name: str) -> Path:
    """The accelerate config file for ``launch.config``: a shipped one by name, or a file.

    Raises:
        UsageError: there is no such file, or it is none that starts processes on this machine alone.
    """
    folder = Path(str(files("rehead.recipes.library") / "accelerate"))
    known = sorted(entry.stem for entry in folder.glob("*.yaml"))
    path, where = (folder / f"{name}.yaml" if name in known else Path(name)), f"launch.config {name}"
    if not path.is_file():
        raise UsageError(f"{where}: no such file; give an accelerate config file or {' or '.join(known)}")
    table = parse_yaml(text_of(path, where, "an accelerate config file"), where)
    if not isinstance(table, dict):
        raise UsageError(f"{where}: is no mapping; give an accelerate config file or {' or '.join(known)}")
    if table.get("num_machines", 1) != 1:
        raise UsageError(f"{where}: num_machines is not 1, and a recipe starts processes on one machine; make it 1")
    return path
