"""What ``accelerate launch`` runs for a recipe with several processes: one uptraining, its arguments from a file."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.errors import UsageError, as_error

HELD, ASKED, STARTED, ERROR = "held", "asked", "started", "error.json"
"""In the folder of the arguments: what the launching process keeps locked while it lives, the number of the signal by
which it asks the launched ones to stop, that accelerate has started one, and a user's mistake that one has met."""


def end_with(folder: Path) -> None:
    """End this process by a signal, which keeps a checkpoint, soon after it is asked to, or its launchers have gone.

    ``kill -9`` on ``rehead run`` or on accelerate's launcher reaches that process alone; those that it launched would
    train on, with OUT locked. A lock says that a process lives where its number does not: a dead one that nobody has
    waited for keeps its number.
    """
    from filelock import FileLock, Timeout

    parent = os.getppid()

    def left() -> bool:
        if os.getppid() != parent or not (folder / HELD).exists():
            return True
        try:
            with FileLock(folder / HELD, timeout=0):
                return True
        except Timeout:
            return False

    def watch() -> None:
        asked = False
        while not left():
            if not asked and (folder / ASKED).exists():
                asked = True
                os.kill(os.getpid(), int((folder / ASKED).read_text(encoding="utf-8")))
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str, quiet: bool = False) -> int:
    """Uptrain; a user's mistake is written beside the arguments, for the process that launched this one.

    Args:
        path: a JSON file of :func:`rehead.recipes.uptrain`'s arguments and of how many ``processes`` there should be.
        quiet: draw nothing.

    Returns:
        the exit code.
    """
    folder, rank = Path(path).parent, os.environ.get("RANK", "0")
    (folder / STARTED).touch()
    end_with(folder)
    try:
        _uptrain(json.loads(Path(path).read_text(encoding="utf-8")), quiet or rank != "0")
    except Exception as broken:
        error = as_error(broken)
        if error is None:
            raise
        from rehead.models import ranks

        if ranks.speaks(error.exit_code):
            write_file(folder / ERROR, json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    return 0


def _uptrain(arguments: dict[str, Any], quiet: bool) -> None:
    from rehead.recipes.training import uptrain
    from rehead.recipes.training.commands import training_bar

    wanted, there = arguments.pop("processes"), int(os.environ.get("WORLD_SIZE", "1"))
    if there != wanted:
        raise UsageError(
            f"launch: accelerate started {there} process{'es' * (there > 1)} where {wanted} were asked for; give a "
            "launch.config that it can start them with, such as ddp or fsdp2"
        )
    if quiet:
        uptrain(**arguments)
    else:
        with training_bar(False) as (progress, on_event):
            uptrain(**arguments, progress=progress, on_event=on_event)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--quiet" in sys.argv[2:]))
