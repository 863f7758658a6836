"""Every conversion says what its result is good for, measured on text, or that nothing was measured and how to."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from rehead.checkpoints.source import LocalSource
from rehead.cli import cli
from rehead.convert import comparison, convert, verdict, verify
from rehead.data.beginning import text_start
from rehead.data.sample import RANDOM, TEXT, sample
from rehead.models.distance import distances, judged
from rehead.recipes.pipeline.named_models import embedded_model

SHORT = ["--calibration-tokens", "1024"]


@pytest.fixture
def trained() -> str:
    """The small trained model that ships with Rehead."""
    return str(embedded_model())


@pytest.mark.parametrize(
    ("asked", "next_flags"),
    [
        ("--kv-heads 1", "--kv-heads 1 --method svd --refit"),
        ("--kv-heads 1 --method svd --calibration-tokens 1024",
         "--kv-heads 1 --method svd --calibration-tokens 1024 --refit"),
        ("--kv-heads 1 --method svd --refit --calibration-tokens 1024",
         "--kv-heads 1 --method svd --calibration-tokens 1024 --refit --fit 300"),
        ("--block parallel", "--refit --block parallel"),
        ("--kv-heads 1 --block parallel --calibration-tokens 1024 --method svd --refit --fit 2", None),
    ],
)  # fmt: skip
def test_a_conversion_ends_with_a_verdict_and_what_does_better(
    trained: str, tmp_path: Path, asked: str, next_flags: str | None
) -> None:
    out = str(tmp_path / "out")
    result = CliRunner().invoke(cli, ["convert", trained, out, *asked.split(), "--json"])
    assert result.exit_code == 0, result.output
    quality = json.loads(result.stdout)["quality"]
    assert quality["verdict"] == judged(quality["kl"], quality["top1_agreement"]) != "usable"
    assert (quality["tokens"], quality["text"]) == (512, TEXT)
    uptrain = ["rehead", "uptrain", out, f"{out}-uptrained", "--data", "TEXT"]
    more = ["rehead", "convert", trained, out, "--overwrite", *(next_flags or "").split()]
    assert shlex.split(quality["better"]) == (more if next_flags else uptrain)
    if next_flags:  # a command that does not work helps nobody
        again = CliRunner().invoke(cli, ["plan", trained, *next_flags.split()])
        assert again.exit_code == 0, again.output


def test_the_figures_are_those_of_transformers(trained: str, tmp_path: Path) -> None:
    done = convert(trained, tmp_path / "out", num_key_value_heads=2)
    tokens = sample(LocalSource(trained), 4096, 4, 128).tokens
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits
                  for f in (trained, tmp_path / "out")]  # fmt: skip
    apart = distances(*logits)
    assert done.verdict.kl == pytest.approx(apart.mean_kl, rel=1e-3)
    assert done.verdict.top1_agreement == pytest.approx(apart.top1_agreement, abs=2e-3)
    manifest = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert manifest["quality"]["word"] == done.verdict.word
    assert f"**{done.verdict.word}**" in (tmp_path / "out" / "README.md").read_text()
    against = verify(tmp_path / "out", trained)
    assert against.text == TEXT
    assert against.against_source["mean_kl"] == pytest.approx(apart.mean_kl, rel=0.5)


def test_the_same_function_is_usable_and_needs_no_advice(trained: str, tmp_path: Path) -> None:
    line = ["convert", trained, str(tmp_path / "out"), "--kv-heads", "8"]
    said = CliRunner().invoke(cli, line).output
    assert "exact: the same function" in said
    assert "KL 0 nats" in said
    assert "better" not in said


def test_without_words_nothing_is_measured_and_the_summary_says_how(tmp_path: Path) -> None:
    source, out = tiny.save_tiny("llama", tmp_path / "m"), tmp_path / "out"
    said = CliRunner().invoke(cli, ["convert", str(source), str(out), "--kv-heads", "1"]).output
    assert "nothing was measured: the model has no tokenizer" in said
    assert f"rehead verify {out} --source {source}" in said
    assert "quality" not in json.loads((out / "rehead.json").read_text())
    assert verify(out, str(source)).text == RANDOM


def test_a_large_model_without_calibration_is_not_measured(trained: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(verdict, "_MOST", 1000)
    done = convert(trained, tmp_path / "out", num_key_value_heads=1)
    assert "longer than this conversion" in str(done.verdict)
    calibrated = convert(trained, tmp_path / "svd", num_key_value_heads=1, method="svd", calibration_tokens=1024)
    assert calibrated.verdict.word is not None


def test_a_comparison_that_fails_does_not_take_the_result_with_it(trained: str, tmp_path: Path, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(comparison, "compare", broken)
    done = convert(trained, tmp_path / "out", num_key_value_heads=1)
    assert str(done.verdict) == "nothing was measured: the comparison failed (no such luck)"
    verify(tmp_path / "out")


def test_a_sample_begins_as_the_tokenizer_begins_a_text(trained: str) -> None:
    from rehead.checkpoints.tokenizer import open_tokenizer

    source = LocalSource(trained)
    tokens = sample(source, 4096, 3, 32).tokens
    assert tokens.shape == (3, 32)
    assert len(tokens.unique()) > 30
    assert torch.equal(tokens, sample(source, 4096, 3, 32).tokens)
    start = text_start(open_tokenizer(source))
    assert torch.equal(tokens[:, : len(start)], start.expand(3, -1))
    assert sample(source, 50, 3, 32).name == RANDOM  # a tokenizer that does not fit


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_verifying_8_gb_takes_less_than_one_and_a_half(tmp_path: Path) -> None:
    """Files, loading, a full pass, a prefill, two decoded tokens and the source's pass, all from disk."""
    script = (
        "import sys; from pathlib import Path; from rehead.benchmarks.convert import write_model; "
        "write_model(Path(sys.argv[1]), 8)"
    )
    source, out = str(tmp_path / "m"), str(tmp_path / "out")
    subprocess.run([sys.executable, "-c", script, source], check=True)
    rehead = [sys.executable, "-m", "rehead.cli"]
    subprocess.run([*rehead, "convert", source, out, "--kv-heads", "8", "--quiet"], check=True)
    # A child's peak starts from its parent's memory, so a small process starts it.
    command = json.dumps([*rehead, "verify", out, "--source", source])
    starter = f"import os, subprocess; p = subprocess.Popen({command}); print(os.wait4(p.pid, 0)[2].ru_maxrss)"
    printed = subprocess.run([sys.executable, "-S", "-c", starter], check=True, capture_output=True, text=True).stdout
    assert "verifies" in printed
    assert int(printed.split()[-1]) * 1024 < 1.5e9
