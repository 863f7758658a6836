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
    uptrain.write_model(tmp_path / "student", setting, setting.kv_heads, 0)
    uptrain.write_model(tmp_path / "teacher", setting, setting.teacher_kv_heads, 1)
    data = uptrain.write_text(tmp_path / "text.txt", setting)
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
