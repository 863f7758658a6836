"""The benchmark of uptraining runs, on sizes that say nothing about speed, and compares what it says it compares."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rehead.benchmarks import uptrain
from rehead.errors import UsageError

SMALL = uptrain.Setting(
    rows=4, length=16, steps=2, warmup=1, hidden_size=32, intermediate_size=48, layers=2, heads=4, teacher_kv_heads=2,
    vocab_size=300, trainer_rows=(2, 4), trainer_weights=("float32",), attention="sdpa", compile=False,
)  # fmt: skip


def test_rows_and_ratios() -> None:
    rows = uptrain.run(SMALL, ["kd"])
    assert [(row.who, row.rows) for row in rows] == [("rehead", 0), ("Trainer", 2), ("Trainer", 4)]
    assert all(row.tokens_per_second > 0 and row.peak_bytes > 0 for row in rows)
    best = max(rows[1:], key=lambda row: row.tokens_per_second)
    assert best.speedup == best.memory == 1.0
    assert rows[0].speedup == pytest.approx(rows[0].tokens_per_second / best.tokens_per_second)
    assert rows[0].memory == pytest.approx(rows[0].peak_bytes / best.peak_bytes)
    assert len(uptrain.table(rows).splitlines()) == 4


def test_a_latent_student_trains_beside_the_one_with_kv_heads() -> None:
    rows = uptrain.run(replace(SMALL, latent=8, rope_dims=4, trainer_rows=()), ["kd"])
    assert [row.who for row in rows] == ["rehead", "latent"]
    assert all(row.tokens_per_second > 0 for row in rows)


def test_both_train_on_the_same_loss(tmp_path, monkeypatch) -> None:
    """The first step's loss is KL(teacher || student) per token for both, before either has moved."""
    setting = replace(SMALL, steps=1, warmup=1)
    for seed, (name, kv_heads) in enumerate((("student", setting.kv_heads), ("teacher", setting.teacher_kv_heads))):
        uptrain.write_model(tmp_path / name, setting, kv_heads, seed, torch.device("cpu"))
    uptrain.write_text(tmp_path / "text.txt", setting)
    data = uptrain.text_name(tmp_path / "text.txt", setting)
    seen = []
    plain = uptrain._Distilling.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        seen.append((float(loss.detach()), inputs["input_ids"]))
        return loss

    monkeypatch.setattr(uptrain._Distilling, "compute_loss", watched)
    uptrain.measure_trainer(tmp_path, "kd", "float32", 4, setting)
    from transformers import AutoModelForCausalLM

    loss, ids = seen[0]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(
                input_ids=ids
            ).logits.log_softmax(-1)
            for name in ("student", "teacher")
        )
    want = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert loss == pytest.approx(want, rel=0.2)  # the Trainer computes in bfloat16
    uptrain.measure_rehead(tmp_path, data, "kd", setting)
    log = (tmp_path / "student-kd" / "training-log.jsonl").read_text().splitlines()
    first = next(event for event in map(json.loads, log) if event["event"] == "step")
    assert first["loss"] == pytest.approx(want, rel=0.25)  # other rows of the same random text


def test_documents_are_lines() -> None:
    rows = uptrain.run(replace(SMALL, document_tokens=10, trainer_rows=()), ["ce"])
    assert [row.who for row in rows] == ["rehead"]


@pytest.mark.parametrize(
    ("changes", "losses", "words"),
    [
        ({"trainer_rows": (3,)}, ["kd"], "choose a divisor"),
        ({"trainer_weights": ("int8",)}, ["kd"], "unknown weights"),
        ({}, ["js"], "unknown loss"),
        ({"warmup": 0}, ["kd"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(changes, losses, words) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]+$") as raised:
        uptrain.run(replace(SMALL, **changes), losses)
    assert words in str(raised.value)


def test_operations_are_those_of_the_products(tmp_path) -> None:
    """Two for each weight of a matrix and token; a 7B model's student and teacher take 8 for each in a step of KD."""
    setting = replace(uptrain.SHAPES["7b"], teacher_kv_heads=8, length=1)
    weights, attention = setting.operations(setting.kv_heads)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 11008
    assert weights == 2 * (32 * layer + 4096 * 32000)
    assert attention < weights / 1000
    assert uptrain.training_operations(setting, "kd") == pytest.approx(4 * weights, rel=1e-3)
    assert uptrain.training_operations(replace(setting, lora_rank=8), "ce") == pytest.approx(2 * weights, rel=1e-3)


def test_flags_replace_a_shape_s_sizes(tmp_path, capsys) -> None:
    sizes = {
        name.replace("_", "-"): getattr(SMALL, name)
        for name in ("rows", "length", "steps", "warmup", "hidden_size", "intermediate_size", "layers", "heads",
                     "kv_heads", "teacher_kv_heads", "vocab_size")
    }  # fmt: skip
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "rows.json"
    uptrain.main(["--shape", "7b", *flags, "--losses", "kd", "--trainer-rows", "", "--no-compile", "--micro-batch", "2",
                  "--lora-rank", "2", "--json", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    assert written["setting"]["gradient_checkpointing"]
    assert not written["setting"]["tied"]
    assert [row["who"] for row in written["rows"]] == ["rehead"]
    assert "MFU" in capsys.readouterr().out
