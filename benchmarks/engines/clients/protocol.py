"""What a client and the runner say to each other: jobs in a JSON file, one line of JSON back for each.

This file and the clients run in an engine's own environment, so they import nothing of Rehead. Each job runs in a
child process, made after the engine was imported: a crash or a hang costs one job, and nothing of one model is left
for the next.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 240


def serve(version: str, handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read jobs from ``argv[1]``, write one line for each to ``argv[2]``; logs go to the job's own file.

    Args:
        version: of the engine, as it reports it.
        handle: runs one job in a child process. It returns ``tokens`` and, where the engine gives them, ``logprobs``,
            ``cache_bytes_per_token`` and ``notes``.
    """
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with open(sys.argv[2], "a") as results:
        for job in jobs:
            started = time.monotonic()
            outcome = _in_child(job, handle)
            outcome |= {"case": job["case"], "version": version, "seconds": round(time.monotonic() - started, 1)}
            results.write(json.dumps(outcome) + "\n")
            results.flush()


def _in_child(job: dict[str, Any], handle: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    answer = Path(job["work"]) / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        # What an engine starts (compilers, workers) is ended with it.
        os.setpgid(0, 0)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            outcome = handle(job)
        except BaseException as error:
            traceback.print_exc()
            outcome = {"error": _one_line(error)}
        answer.write_text(json.dumps(outcome))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    deadline = time.monotonic() + LIMIT_SECONDS
    status = None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.05)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"error": f"no answer in {LIMIT_SECONDS} s"}
    if answer.is_file():
        return json.loads(answer.read_text())
    signalled = os.WIFSIGNALED(status)
    return {"error": f"ended by signal {os.WTERMSIG(status)}" if signalled else "ended without an answer"}


def _one_line(error: BaseException) -> str:
    """The reason without paths of this machine: it goes into a table that is published."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return re.sub(r"(/[\w.+-]+){2,}/?", "PATH", text)[:300]
