"""The documentation: short where it should be, built without a warning, and its commands and notebook run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rehead.benchmarks.quality import LINES, draw, table
from rehead.patches.commands import BENCHMARKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECORD = json.loads((DOCS / "assets" / "quality.json").read_text())
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_readme_fits_on_a_page_or_two() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_menu() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    menu = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_variant_has_a_page() -> None:
    from rehead.variants.contract import VARIANTS

    pages = {path.stem for path in (DOCS / "variants").glob("*.md")}
    assert set(VARIANTS.names()) - {"parallel", "serial"} | {"blocks"} == pages


def test_the_glossary_is_in_order() -> None:
    terms = re.findall(r"^\*\*(.+?)\.?\*\*", (DOCS / "glossary.md").read_text(), re.M)
    assert terms == sorted(set(terms), key=str.lower)


def test_no_paragraph_stands_twice() -> None:
    seen: dict[str, str] = {}
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        prose = re.sub(r"```.*?```|<!-- \w+ -->.*?<!-- /\w+ -->", "", path.read_text(), flags=re.S)
        for paragraph in prose.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) > 160:
                assert words not in seen, f"{path.name} and {seen[words]}: {words[:80]}"
                seen[words] = path.name


def test_the_picture_and_its_table_are_the_record(tmp_path: Path) -> None:
    assert f"<!-- quality -->\n{table(RECORD)}\n<!-- /quality -->" in (DOCS / "choosing.md").read_text()
    assert {row["line"] for row in RECORD["rows"]} == set(LINES)
    draw(RECORD, tmp_path / "again.svg")
    words = re.findall(r">([^<>]*[a-z][^<>]*)</text>", (tmp_path / "again.svg").read_text())
    assert words == re.findall(r">([^<>]*[a-z][^<>]*)</text>", (DOCS / "assets" / "quality.svg").read_text())


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="`make docs` installs what builds the site")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**OFFLINE, "NO_MKDOCS_2_WARNING": "1"}, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    latents = (tmp_path / "site" / "variants" / "latent" / "index.html").read_text()
    assert '<span class="whole">--own-text</span>' in latents
    page = (tmp_path / "site" / "index.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", page)


def test_the_notebook_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    if importlib.util.find_spec("ipykernel") is None:
        pytest.skip("ipykernel is not installed")
    for key in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(key, "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "proved" in printed
    assert "fitted" in printed


@pytest.mark.slow
def test_the_quick_tour_runs_as_printed(tmp_path: Path) -> None:
    """Every command up to the part for a GPU, in an empty folder, as a new user would."""
    tour = (DOCS / "quick-tour.md").read_text().split("## All of it")[0]
    commands = [line for block in re.findall(r"```\n(.*?)```", tour, re.S) for line in block.splitlines() if line]
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "rehead"
        done = subprocess.run(
            [sys.executable, "-m", "rehead", *words[1:]], cwd=tmp_path, capture_output=True, text=True, env=OFFLINE
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-500:]}"
    assert (tmp_path / "report" / "report.html").is_file()


def test_every_benchmark_command_has_a_line_among_the_figures() -> None:
    figures = (DOCS / "figures.md").read_text()
    assert BENCHMARKS
    assert not [name for name in BENCHMARKS if f"`{name}`" not in figures and f"bench {name}`" not in figures]
