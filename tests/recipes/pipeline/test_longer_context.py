"""The recipe `longer-context`, run small: extend, uptrain at the new or the old length, evaluate by length."""

from __future__ import annotations

import json

import pytest

SMALL = [
    "uptrain.tokens=2048", "uptrain.batch_tokens=1024", "uptrain.eval_tokens=1024", "control=false",
    "convert.context=512",
    "convert.calibration=[random]", "convert.calibration_tokens=256", "convert.calibration_length=64",
    "evaluate.tokens=1024", "evaluate.window=512", "evaluate.recall=[64,400]", "evaluate.recall_trials=1",
    "evaluate.needle=[64,500]", "evaluate.needle_trials=1", "evaluate.samples=0", "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize(("way", "length"), [("yarn", 512), ("drope", 256)])
def test_extended_uptrained_and_measured_by_length(way, length, run, home, tiny_model, tmp_path) -> None:
    sweep = f"{{way: {{{way}: {{convert.rope: {way}, uptrain.seq_length: {length}}}}}}}"
    settings = [f"model={tiny_model}", f"uptrain.data=[{home}/train.txt]", f"uptrain.eval_data=[{home}/heldout.txt]",
                f"evaluate.data=[{home}/heldout.txt]", f"sweep={sweep}"]  # fmt: skip
    flags = [part for setting in [*settings, *SMALL] for part in ("--set", setting)]
    code, out, err = run("run", "longer-context", *flags, "--out", str(tmp_path / "out"))
    assert code == 0, out + err
    documents = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("evaluation.json")]
    assert documents
    after = next(each for each in documents if each["model"]["uptraining"])
    assert {row["distance"] for row in after["recall"] if row["who"] == "model"} == {64, 400}
    assert {cell["length"] for cell in after["needle"] if cell["who"] == "model"} == {64, 500}
    configs = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("config.json")]
    if way == "drope":
        assert any(config.get("no_rope_layers") == [0, 0] for config in configs)
    else:
        assert all(config["rope_parameters"]["rope_type"] == "yarn" for config in configs)
    assert {config["max_position_embeddings"] for config in configs} == {512}
