"""The joint stage: windows come nearer to the teacher, or are put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rehead.convert import convert
from rehead.errors import UsageError
from rehead.models.live import decoder_layers
from rehead.recipes import uptrain
from rehead.recipes.training.joint import _output_of


@pytest.mark.parametrize("layers", [1, 2])
def test_windows_come_nearer_before_the_training(tiny, tmp_path: Path, layers: int) -> None:
    events: list[dict] = []
    options = tiny.options(
        joint_layers=layers, joint_tokens=4096, tokens=1024, eval_data=[tiny.held], train="attention"
    )
    uptrain(tiny.student, tmp_path / "out", **options, on_event=events.append)
    windows = [event for event in events if event["event"] == "joint"]
    assert [event["layers"] for event in windows] == ([[0, 0], [1, 1]] if layers == 1 else [[0, 1]])
    assert all(event["kept"] and event["error_after"] < 0.95 * event["error_before"] for event in windows)
    assert [event["event"] for event in events[:2]] == ["start", "joint"]
    plain: list[dict] = []
    options.pop("joint_layers")
    uptrain(tiny.student, tmp_path / "plain", **options, on_event=plain.append)
    first, without = (next(e for e in told if e["event"] == "evaluation") for told in (events, plain))
    assert first["step"] == without["step"] == 0
    assert first["kl"] < 0.8 * without["kl"]


def test_a_window_that_comes_out_no_nearer_is_put_back(tiny, tmp_path: Path) -> None:
    events: list[dict] = []
    options = tiny.options(joint_layers=2, joint_tokens=2048, learning_rate=10.0, tokens=512, warmup=0.0)
    uptrain(tiny.student, tmp_path / "out", **options, on_event=events.append)
    window = next(event for event in events if event["event"] == "joint")
    assert not window["kept"]
    assert window["error_after"] > window["error_before"]
    # The training behind it began where it would have begun without.
    plain: list[dict] = []
    options.pop("joint_layers")
    uptrain(tiny.student, tmp_path / "plain", **options, on_event=plain.append)
    first, without = (next(e["loss"] for e in told if e["event"] == "step") for told in (events, plain))
    assert first == pytest.approx(without, rel=1e-6)


def test_nothing_behind_a_window_is_computed(tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
    layers, called = decoder_layers(model), []
    layers[1].register_forward_hook(lambda *_: called.append(1))
    ids = torch.arange(12)[None]
    found = _output_of(model, layers[0], {"input_ids": ids})
    assert not called
    assert torch.equal(found, model(ids, output_hidden_states=True).hidden_states[1])


def test_it_needs_a_teacher(tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--joint-layers: needs a teacher"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options(loss="ce", joint_layers=2))


def test_it_needs_hidden_states_of_one_width(tiny, tmp_path: Path) -> None:
    convert(tiny.teacher, tmp_path / "wide", num_key_value_heads=1, reinvest="hidden")
    with pytest.raises(UsageError, match=r"--joint-layers: compares hidden states, of \d+ numbers .* leave it out"):
        uptrain(tmp_path / "wide", tmp_path / "out", **tiny.options(joint_layers=2, joint_tokens=512))
