"""`evaluate --patch` with variants for texts beyond the trained length: nothing is left out for being too long."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from click.testing import CliRunner

from rehead.convert import convert
from rehead.recipes.evaluation.commands import evaluate_command
from rehead.recipes.scratch import NewModel, new_model

ROWS = [
    ("dual_chunk", True), ("dual_chunk:chunk=48", True), ("self_extend:group=16,neighbours=16", True),
    ("context:tokens=512", False), ("context:tokens=512,rope=dynamic", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (files("rehead.recipes.assets") / "embedded" / "README.md").read_text()
    shape = NewModel(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return new_model(tmp_path_factory.mktemp("model") / "tiny", [text * 20], shape)


@pytest.mark.parametrize(("patch", "short_exact"), ROWS)
def test_a_patched_model_is_measured_beyond_its_length(patch: str, short_exact: bool, model: Path, tmp_path: Path):
    data = files("rehead.recipes.assets") / "heldout.txt.gz"

    def evaluated(*flags: str) -> dict:
        line = [str(model), "--data", str(data), "--tokens", "512", "--samples", "0", "--device", "cpu", "--json"]
        done = CliRunner().invoke(evaluate_command, [*line, "--convention", "disjoint", *flags])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    tries = ["--recall", "16,200", "--recall-trials", "1", "--needle", "160", "--needle-trials", "1"]
    long = evaluated("--patch", patch, "--window", "256", *tries)
    assert {(row["who"], row["distance"]) for row in long["recall"]} == {
        (who, distance) for who in ("baseline", "model") for distance in (16, 200)
    }
    assert {cell["length"] for cell in long["needle"]} == {160}
    assert not any("left out" in note for note in long["notes"])
    assert any("extrapolation is part of it" in note for note in long["notes"])
    assert long["divergence"][0]["mean"] > 0
    short = evaluated("--patch", patch, "--window", "32")["divergence"][0]["mean"]
    assert (short < 1e-9) == short_exact


def test_without_such_a_patch_it_is_left_out_as_before(model: Path):
    done = CliRunner().invoke(
        evaluate_command,
        [str(model), "--tokens", "128", "--window", "32", "--samples", "0", "--recall", "200", "--json"],
    )
    assert "recall at a distance of 200 left out for the model: it has positions for 64" in done.stdout


def test_a_longer_checkpoint_is_compared_within_the_length_of_its_original(model: Path, tmp_path: Path):
    """Beyond it the original fails, so a KL there would call the better model the worse one."""
    convert(model, tmp_path / "out", context=512, rope="longrope")
    line = [str(tmp_path / "out"), "--baseline", str(model), "--tokens", "512", "--samples", "0", "--device", "cpu"]
    line += ["--data", "built-in:heldout", "--data", "built-in:speeches"]
    told = {}
    for window in (32, 256):
        done = CliRunner().invoke(
            evaluate_command, [*line, "--window", str(window), "--convention", "disjoint", "--json"]
        )
        assert done.exit_code == 0, done.output
        told[window] = json.loads(done.stdout)
    assert [told[window]["divergence"][0]["window"] for window in told] == [32, 64]
    assert told[256]["divergence"][0]["mean"] < 1e-9
    assert {row["window"] for row in told[256]["perplexity"]} == {256}
    values = {row["who"]: row["value"] for row in told[256]["perplexity"]}
    assert values["model"] != values["baseline"]
    # Said once, however many texts there are.
    assert [sum("on windows of 64 tokens" in note for note in each["notes"]) for each in told.values()] == [0, 1]
