"""``make engines``: set up engines, run them on small models, record and print what came out.

python -m rehead.benchmarks.engines --engines llama.cpp vllm --cases llama qwen2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehead.benchmarks.engines import environments, runner
from rehead.benchmarks.engines.cases import CASES
from rehead.benchmarks.engines.table import digest, put, table
from rehead.errors import ReheadError, check_names

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "models" / "serving.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 2 on an unknown name or a failed set-up."""
    parser = argparse.ArgumentParser(prog="engines", description=__doc__.split("\n\n")[0])
    parser.add_argument("--engines", nargs="+", default=list(environments.ENGINES), metavar="NAME")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="NAME")
    parser.add_argument("--environments", type=Path, default=Path(".engines"), metavar="DIR", help="default: .engines")
    parser.add_argument("--work", type=Path, default=Path(".engines/work"), metavar="DIR", help="models, jobs and logs")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE", help="JSON that is added to")
    parser.add_argument("--set-up-only", action="store_true", help="install the engines and stop")
    parser.add_argument("--table", action="store_true", help="print the recorded table and stop")
    parser.add_argument("--pages", action="store_true", help="write the recorded table into the pages that show it")
    arguments = parser.parse_args(argv)
    try:
        _run(arguments)
    except ReheadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _run(arguments: argparse.Namespace) -> None:
    results: dict[str, Any] = json.loads(arguments.record.read_text()) if arguments.record.is_file() else {"rows": []}
    if arguments.pages:
        put(table(results), ROOT / "docs" / "engines.md")
        put(digest(results), ROOT / "README.md")
    if arguments.table or arguments.pages:
        print(table(results))
        return
    check_names("case", arguments.cases, CASES)
    folder, work = arguments.environments.absolute(), arguments.work.absolute()
    for name in arguments.engines:
        environments.set_up(name, folder)
    if arguments.set_up_only:
        return
    answers = runner.references(arguments.cases, work)
    for name in arguments.engines:
        print(f"running {environments.engine(name).title} on {len(answers)} models", flush=True)
        results = runner.merge(results, answers, runner.ask(name, list(answers), answers, folder, work))
        # Recorded after each engine, so that a run that is interrupted loses one.
        arguments.record.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
