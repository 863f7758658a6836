"""transformers' own tests with tiled attention in place of SDPA: what fails only then.

python -m rehead.benchmarks.transformers_tests CHECKOUT [--models llama gemma3 ...] [-k EXPRESSION] [--workers 2]

CHECKOUT is a clone of transformers at the installed version. Its tests run twice, as they are and with tiled attention
under the name ``sdpa``. Exit code 4 where a test fails only with tiled attention for another reason than a refusal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from rehead.console import echo, printable
from rehead.errors import ReheadError, UsageError, VerificationError

#: Decoders whose attention differs: plain, windows, soft cap, norms on keys, sinks, partial rotation, experts, ALiBi.
MODELS = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_oss", "glm", "mixtral", "phi3", "falcon")
PLUGIN = "rehead.benchmarks.in_place_of_sdpa"
#: What tiled attention raises when it refuses a call.
_REFUSALS = ("UnsupportedError", "UsageError")


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    Attributes:
        status: ``passed``, ``failed`` or ``skipped``.
        reason: the first line of the error, for a test that failed.
    """

    status: str
    reason: str = ""

    @property
    def refused(self) -> bool:
        """Whether it failed because tiled attention refused the call, which loses nothing in silence."""
        return any(name in self.reason for name in _REFUSALS)


def outcomes(report: Path) -> dict[str, Outcome]:
    """The outcome of each test, by name, from pytest's report in JUnit's XML."""
    ended = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        broken = next((part for part in case if part.tag in ("failure", "error")), None)
        if broken is not None:
            ended[name] = Outcome("failed", (broken.get("message") or broken.text or "").strip().split("\n")[0][:200])
        else:
            ended[name] = Outcome("skipped" if case.find("skipped") is not None else "passed")
    return ended


def only_with_ours(before: Mapping[str, Outcome], after: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Tests that pass or are skipped as they are and fail with tiled attention."""
    return {
        name: outcome
        for name, outcome in after.items()
        if outcome.status == "failed" and before.get(name, Outcome("passed")).status != "failed"
    }


def run_tests(
    checkout: Path, files: Sequence[str], expression: str | None, workers: int, plugin: bool
) -> dict[str, Outcome]:
    """Run test files of a checkout in a process of their own and return how each test ended.

    Raises:
        UsageError: pytest could not collect them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-p", PLUGIN] if plugin else []
        command += ["-n", str(workers)] if workers else []
        command += ["-k", expression] if expression else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run([*command, *files], cwd=checkout, env=environment, capture_output=True, text=True)
        if not report.is_file() or ended.returncode > 1:
            lines = (ended.stdout + ended.stderr).strip().splitlines() or ["no output"]
            raise UsageError(
                f"{checkout}: pytest could not run its tests ({printable(lines[-1])}); see that it is whole"
            )
        return outcomes(report)


def compare(checkout: Path, models: Sequence[str], expression: str | None, workers: int) -> dict[str, Outcome]:
    """Run the models' tests both ways, print the counts, and return what fails only with tiled attention.

    Raises:
        UsageError: the folder is no checkout, or of another version than is installed.
    """
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
    missing = [file for file in files if not (checkout / file).is_file()]
    if missing:
        raise UsageError(f"{checkout}: has no {missing[0]}; give a clone of transformers, and models that it tests")
    source = checkout / "src" / "transformers" / "__init__.py"
    if source.is_file() and f'__version__ = "{transformers.__version__}"' not in source.read_text(encoding="utf-8"):
        raise UsageError(f"{checkout}: is not of the installed version; check out v{transformers.__version__}")
    ways = {}
    for title, plugin in (("as they are", False), ("with tiled attention", True)):
        ways[title] = run_tests(checkout, files, expression, workers, plugin)
        counts = Counter(outcome.status for outcome in ways[title].values())
        echo(f"{title}: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")))
    return only_with_ours(*ways.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 4 where a test fails only with tiled attention and was not refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("-k", dest="expression", metavar="EXPRESSION", help="as pytest's")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest-xdist; default: one")
    options = parser.parse_args(argv)
    try:
        new = compare(options.checkout.absolute(), options.models, options.expression, options.workers)
        wrong = [name for name, outcome in new.items() if not outcome.refused]
        for name in wrong:
            echo(f"FAILED {printable(name)}: {printable(new[name].reason)}")
        refused = Counter(
            (name.rsplit("::", 1)[-1], outcome.reason) for name, outcome in new.items() if outcome.refused
        )
        for (test, reason), count in refused.items():
            echo(f"refused {count} x {printable(test)}: {printable(reason)}")
        echo(f"{len(new)} fail only with tiled attention, {len(new) - len(wrong)} of them refused by name")
        if wrong:
            raise VerificationError(f"{wrong[0]}: fails only with tiled attention; report it")
    except ReheadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
