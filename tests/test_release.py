"""What is released: a source distribution, the wheel built from it, and that wheel at work outside the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"


def run(*words: object, where: Path, **environment: str) -> str:
    """Run a command and return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), cwd=where, env=inherited | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel), the second built from the first. The clone itself is left as it is."""
    from shutil import copytree, ignore_patterns

    work = tmp_path_factory.mktemp("release")
    unwanted = ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo-*")
    copytree(ROOT, work / "clone", ignore=unwanted)
    (work / "clone" / ".ci").mkdir()
    (work / "clone" / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    run(sys.executable, "-c", BUILD.format("sdist", str(work)), where=work / "clone")
    sdist = next(work.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    folder = next((work / "unpacked").iterdir())
    run(sys.executable, "-c", BUILD.format("wheel", str(work)), where=folder)
    return sdist, next(work.glob("*.whl"))


def test_the_source_distribution_is_what_a_clone_is(released: tuple[Path, Path]) -> None:
    with tarfile.open(released[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "docs/index.md",
        "docs/tour.ipynb",
        "docs/assets/quality.svg",
    }
    assert wanted | {"tests/test_release.py", ".ci/run", "CHANGELOG.md"} <= names


def test_the_wheel_holds_the_package_alone(released: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(released[1]).namelist()
    assert {name.split("/", 1)[0] for name in names if "dist-info" not in name} == {"rehead"}
    assert not [name for name in names if name.startswith(("rehead/tests/", "rehead/docs/"))]
    assert "rehead/recipes/assets/embedded/model.safetensors" in names


def test_the_wheel_runs_outside_the_clone(released: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(released[1]) as wheel:
        wheel.extractall(site)
    places = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    where = run(sys.executable, "-c", "import rehead; print(rehead.__file__)", where=tmp_path, **places)
    assert Path(where.strip()).is_relative_to(site)
    assert "Usage: rehead" in run(sys.executable, "-m", "rehead", "--help", where=tmp_path, **places)
    run(sys.executable, "-m", "rehead", "convert", "embedded", "out", "--kv-heads", 2, where=tmp_path, **places)
    assert "verifies" in run(sys.executable, "-m", "rehead", "verify", "out", where=tmp_path, **places)
