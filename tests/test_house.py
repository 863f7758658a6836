"""The house itself: what ships, what starts fast, what never appears."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import click
import pytest

import rehead
from rehead.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


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
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert link.startswith("http") or (document.parent / link).exists(), f"{document.name}: {link}"


def test_every_path_in_the_documents_exists() -> None:
    """Paths that begin in a room, and files of code by their names alone; capitals stand for a name to fill in."""
    rooms = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "build"))]
    begins_in_a_room = rf"(?<![\w./~<-])(?:{'|'.join(map(re.escape, rooms))})/[\w./-]*"
    by_name = {path.name for path in ROOT.rglob("*.py")}
    checked = 0
    for document in DOCUMENTS:
        text = re.sub(r"\]\([^)]*\)", "]", document.read_text(encoding="utf-8"))
        for path in (path.rstrip(".") for path in re.findall(begins_in_a_room, text)):
            if "NAME" not in path:
                assert (ROOT / path).exists() or (document.parent / path).exists(), f"{document.name}: {path}"
                checked += 1
        for name in re.findall(r"(?<![\w./-])[a-z_]+\.py\b", text):
            assert name in by_name, f"{document.name}: {name}"
            checked += 1
    assert checked > 50


def test_every_module_and_name_in_the_documents_can_be_imported() -> None:
    checked = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for module, names in re.findall(r"from (rehead[\w.]*) import ([\w, ]+)", text):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{document.name}: {module} {name}"
                checked += 1
        if document.name == "CHANGELOG.md":  # what is gone stands there too
            continue
        for module in re.findall(r"\brehead(?:\.[a-z_]+)+\b(?!\.\w)", text):
            if module in ("rehead.json", "rehead.cli") or module.endswith(".json"):
                continue
            home, _, name = module.rpartition(".")
            is_there = importlib.util.find_spec(home) is not None and importlib.util.find_spec(module) is not None
            assert is_there or hasattr(importlib.import_module(home), name), f"{document.name}: {module}"
            checked += 1
    assert checked > 10


def test_the_example_of_a_variant_is_one_small_folder() -> None:
    """What CONTRIBUTING says of it: at most 60 lines, and in the rest of the code one line of a table."""
    folder = ROOT / "variants/temperature"
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["__init__.py"]
    code = (folder / "__init__.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 60
    naming = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "build", ".check") and folder not in path.parents
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"variants.temperature|\"temperature\": \"", line)
    ]
    assert naming == [("variants/contract.py", '"temperature": "rehead.variants.temperature",')]
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    for line in (line.strip() for block in shown[:2] for line in block.splitlines() if line.strip()):
        assert line in code or line.startswith("def attend("), line


def test_documents_name_commands_and_options_that_exist() -> None:
    """Every `rehead COMMAND ... --option` of the READMEs is one that the command takes."""
    found = 0
    for document in DOCUMENTS:
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


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning])
@pytest.mark.parametrize("module", ["rehead.models.live", "transformers_modules.out.modeling_rehead_window"])
def test_what_our_own_calls_are_warned_of_is_an_error(kind: type[Warning], module: str) -> None:
    """In every test, from the package and from modelling files that travel; warnings at others stay warnings."""
    call = compile("def call(): old()\n", module, "exec")

    def old() -> None:
        warnings.warn("an old name", kind, stacklevel=2)

    scope: dict = {"__name__": module, "old": old}
    exec(call, scope)
    with pytest.raises(kind, match="an old name"):
        scope["call"]()
