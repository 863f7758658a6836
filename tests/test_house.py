"""The house itself: what ships, what starts fast, what never appears."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pytest

import rehead
from rehead.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    found = {
        ".".join(["rehead", *path.parent.relative_to(ROOT).parts])
        for path in ROOT.rglob("__init__.py")
        if not {".venv", "build", "tests"} & set(path.relative_to(ROOT).parts)
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_pins_cover_the_dependencies() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    needed = {re.split(r"[<>=\[]", dep)[0].lower() for dep in PROJECT["project"]["dependencies"]}
    assert needed <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_help_starts_without_torch() -> None:
    code = "import sys; from rehead.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.slow
def test_help_is_fast() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rehead.cli", "--help"], check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.35, times


def test_no_pickle_and_no_remote_code() -> None:
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", ".venv", "build") or parts[0].startswith("."):
            continue
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        assert not re.search(r"^\s*(import pickle|from pickle|.*torch\.load\()", text, re.M), path


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert rehead.__version__ == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_every_link_in_the_documents_leads_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), ROOT / "patches/README.md", ROOT / "recipes/README.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert link.startswith("http") or (document.parent / link).exists(), f"{document.name}: {link}"


def test_documents_name_commands_and_options_that_exist() -> None:
    """Every `rehead COMMAND ... --option` of the READMEs is one that the command takes."""
    found = 0
    for document in (ROOT / "README.md", ROOT / "patches/README.md", ROOT / "recipes/README.md"):
        for line in re.findall(r"\brehead (.*)", document.read_text(encoding="utf-8").replace("\\\n", " ")):
            for part in re.split(r"\brehead |`|#", line)[:1]:
                words = part.split()
                if not words or words[0] not in COMMANDS or words[0] == "bench":
                    continue
                command = cli.get_command(click.Context(cli), words[0])
                options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
                given = {word.split("=")[0].rstrip(",;)") for word in words if word.startswith("--")}
                assert given <= options, f"{document.name}: rehead {part.strip()}: {sorted(given - options)}"
                found += len(given)
    assert found > 20
