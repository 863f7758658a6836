"""What the tests of every part share."""

from __future__ import annotations

import logging

import pytest

from rehead.cli import main


class _NoOldNames(logging.Filter):
    """Fails a test whose calls, or ours, give or ask a model of transformers 5.24 for its cache under the old name."""

    def filter(self, record: logging.LogRecord) -> bool:
        assert "past_key_values" not in record.getMessage(), record.getMessage()
        return True


# Arguments under the old name are FutureWarnings, which pyproject.toml makes errors; fields of outputs are logged.
logging.getLogger("transformers.utils.generic").addFilter(_NoOldNames())


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
