"""The recovery benchmark, small: every kind of cell runs, and its table says what the logs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rehead.benchmarks import recovery
from rehead.benchmarks.recovery import STARTS, STUDIES, Cell, chosen, main, run
from rehead.errors import UsageError
from rehead.recipes.scratch import NewModel, new_model
from rehead.recipes.training.options import UptrainOptions

LINES = [f"In the year {year} the harbours took in {year * 3} bales and the treasury was {word}." for year in
         range(1790, 1990) for word in ("full", "empty", "a matter of grave concern to the Congress")]  # fmt: skip
SMALL = {
    "tokens": 1024, "batch_tokens": 512, "seq_length": 64, "micro_batch": 4, "checkpoint_every": 0, "eval_tokens": 512,
    "learning_rate": 1e-3,
}  # fmt: skip


def test_every_cell_can_be_meant() -> None:
    names = [cell.name for cells in STUDIES.values() for cell in cells]
    assert len(names) == len(set(names))
    for cell in chosen(list(STUDIES)):
        assert cell.start in (*STARTS, "original")
        UptrainOptions.parse({"data": ("x",), **cell.options}).objective()
    with pytest.raises(UsageError, match="did you mean 'rates'"):
        chosen(["ratse"])


def test_cells_run_and_failures_do_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES))
    held = tmp_path / "held.txt"
    held.write_text("\n".join(LINES[::7]))
    shape = NewModel(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="float32",
    )
    model = str(new_model(tmp_path / "model", LINES, shape))
    cheap = {"calibration_tokens": 2048, "calibration_length": 64, "refit": True, "fit": 2, "method": "svd"}
    monkeypatch.setitem(STARTS, "svd+refit+fit", cheap)
    cells = [
        Cell("mean", "mean", SMALL),
        Cell("wrong", "mean", {**SMALL, "train": "nothing_of_that_name"}),
        Cell("best", "svd+refit+fit", SMALL),
        Cell("control", "original", {**SMALL, "loss": "ce"}),
    ]
    found = run(model, [f"{text}#lines"], [str(held)], tmp_path / "work", cells)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["mean", "best", "control"]
    assert "wrong" in capsys.readouterr().out
    assert rows["control"]["kl_before"] == pytest.approx(0, abs=1e-6)
    assert rows["control"]["kl"] > 0
    assert rows["best"]["kl_before"] < rows["mean"]["kl_before"]
    assert all(row["tokens"] == 1024 and row["perplexity"] > 1 for row in rows.values())
    assert found["curves"]["mean"][0]["tokens"] == 0
    assert json.loads((tmp_path / "work" / "recovery.json").read_text())["rows"] == found["rows"]
    assert len([path for path in (tmp_path / "work" / "tokens").iterdir() if path.is_dir()]) == 1
    none = run(model, [str(text)], [str(held)], tmp_path / "late", cells[:1], budget=-1.0)
    assert none["rows"] == []


def test_an_unknown_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model", "--data", "a", "--held-out", "b", "--work", str(tmp_path), "--studies", "start"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: unknown study 'start'")
    assert recovery.BEST in STARTS
