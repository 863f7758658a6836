"""What benchmarks of GPU kernels have in common on the command line: flags, the report, errors in one line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rehead.benchmarks.machine import headline, machine
from rehead.errors import ReheadError


def kernel_parser(name: str, description: str, cases: Iterable[str], peers: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of ``rehead bench NAME`` with ``--only``, ``--peers`` and ``--json``."""
    parser = argparse.ArgumentParser(prog=f"rehead bench {name}", description=description)
    parser.add_argument("--only", action="append", help=f"one of {', '.join(cases)}; repeatable")
    parser.add_argument("--peers", default=",".join(peers), help="names with commas between (default: all of them)")
    parser.add_argument("--json", help="also write the rows to this file")
    return parser


def print_report(title: str, text: str, rows: Sequence[dict[str, Any]], file: str | None) -> None:
    """Print the machine, a title and the table; write machine and rows to ``file`` where one is named."""
    facts = machine()
    print(headline(facts))
    print(title)
    print(text)
    if file:
        with open(file, "w") as sink:
            json.dump({"machine": facts, "rows": rows}, sink, indent=1)


def run_script(main: Callable[[], None]) -> None:
    """Run a benchmark as a script: what is wrong with its use is said in one line."""
    try:
        main()
    except ReheadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
