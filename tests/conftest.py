"""What the tests of every part share."""

from __future__ import annotations

import pytest

from rehead.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run the CLI in this process: (exit code, standard output, standard error)."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture
def model():
    """A tiny random LLaMA."""
    from rehead.benchmarks.tiny import tiny_model

    return tiny_model("llama")
