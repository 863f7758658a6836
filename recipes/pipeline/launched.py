"""What ``accelerate launch`` runs for a recipe with several processes: one uptraining, its arguments from a file."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rehead.checkpoints.files import is_running
from rehead.errors import ReheadError, UsageError


def end_with(pid: int) -> None:
    """End this process by SIGTERM, which keeps a checkpoint, soon after another process of this machine has gone.

    ``kill -9`` on ``rehead run`` reaches that process alone; those that it launched would train on, with OUT locked.
    """

    def watch() -> None:
        while is_running(pid):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(path: str, quiet: bool = False) -> int:
    """Uptrain; a user's mistake is written beside the arguments, for the process that launched this one.

    Args:
        path: a JSON file of :func:`rehead.recipes.uptrain`'s arguments, of how many ``processes`` there should be, and
            of the process they were ``launched_by``, with which they end.
        quiet: draw nothing.

    Returns:
        the exit code.
    """
    from rehead.recipes.training import uptrain
    from rehead.recipes.training.commands import training_bar

    first = os.environ.get("RANK", "0") == "0"
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))
        end_with(arguments.pop("launched_by"))
        wanted, there = arguments.pop("processes"), int(os.environ.get("WORLD_SIZE", "1"))
        if there != wanted:
            raise UsageError(
                f"launch: accelerate started {there} process{'es' * (there > 1)} where {wanted} were asked for; give a "
                "launch.config that it can start them with, such as ddp or fsdp2"
            )
        if quiet or not first:
            uptrain(**arguments)
        else:
            with training_bar(False) as (progress, on_event):
                uptrain(**arguments, progress=progress, on_event=on_event)
    except ReheadError as error:
        if first:
            table = {"error": str(error), "exit_code": error.exit_code}
            Path(path).with_name("error.json").write_text(json.dumps(table), encoding="utf-8")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--quiet" in sys.argv[2:]))
