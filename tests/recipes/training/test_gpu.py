"""On a GPU: bfloat16 beside float32 masters, figures that are read a step late, runs that go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rehead.errors import VerificationError
from rehead.recipes import uptrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_it_learns_and_every_figure_is_there(tiny, tmp_path: Path) -> None:
    events: list[dict] = []
    options = tiny.options(device="cuda", tokens=16384, eval_data=[tiny.held], eval_every=8)
    uptrain(tiny.student, tmp_path / "out", **options, on_event=events.append)
    assert events[0]["dtype"] == "bfloat16"
    figures = [event for event in events if event["event"] == "evaluation"]
    assert figures[-1]["kl"] < 0.5 * figures[0]["kl"]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 33))
    assert all(event["loss"] == pytest.approx(event["kl"], rel=1e-2) for event in steps)
    assert all(event["peak_memory_bytes"] > 0 for event in steps)


def test_float32_gives_the_curve_of_the_cpu(tiny, tmp_path: Path) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        events: list[dict] = []
        options = tiny.options(device=device, dtype="float32", attention="sdpa")
        uptrain(tiny.student, tmp_path / device, **options, on_event=events.append)
        curves.append([event["loss"] for event in events if event["event"] == "step"])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_a_nan_is_named_though_the_next_step_is_under_way(tiny, tmp_path: Path) -> None:
    from rehead.recipes.training.losses import loss, registry

    calls = {"left": 4}

    @loss("nan_on_a_gpu", "for this test", needs_teacher=False)
    def nan_on_a_gpu(batch):
        calls["left"] -= 1
        return -batch.student_log_probs()[:, 0] * (float("nan") if calls["left"] == 0 else 1.0)

    try:
        options = tiny.options(device="cuda", loss="nan_on_a_gpu", checkpoint_every=3)
        with pytest.raises(VerificationError, match=r"the loss of step 4 .* the checkpoint of step 3 is kept"):
            uptrain(tiny.student, tmp_path / "out", **options)
    finally:
        registry.TERMS.remove("nan_on_a_gpu")


def test_a_run_goes_on(tiny, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Stop

    uptrain(tiny.student, tmp_path / "whole", **tiny.options(device="cuda"))
    with pytest.raises(Stop):
        uptrain(tiny.student, tmp_path / "out", **tiny.options(device="cuda"), on_event=stop)
    events: list[dict] = []
    uptrain(tiny.student, tmp_path / "out", **tiny.options(device="cuda"), on_event=events.append)
    assert events[0]["event"] == "resume"
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    # Sums on a GPU may come in another order from run to run.
    assert all((weight - out[name]).abs().max() < 1e-2 * weight.abs().max() for name, weight in whole.items())
