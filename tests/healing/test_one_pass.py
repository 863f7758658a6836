"""One pass over the text serves any number of closed forms."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rehead.convert import convert, convert_many, verify
from rehead.convert.calibrated import calibrate_many, calibration_text, job_of
from rehead.convert.execute import plan
from rehead.errors import UsageError
from rehead.healing.finished import FinishedLayers
from rehead.healing.layerwise import LayerwiseModel
from rehead.healing.run import _start, observe
from rehead.models.families.layouts import split
from rehead.variants.pool.regroup import POOL_MOMENTS, reconstruction_error

CPU = torch.device("cpu")
TEXT = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save_tiny("llama-mha", tmp_path_factory.mktemp("models") / "llama-mha")


def plans(source: Path, *counts: int, **options):
    return [plan(source, num_key_value_heads=kv, method="svd", **TEXT, **options) for kv in counts]


def test_moments_of_one_pass_are_those_gathered_for_each_count(source: Path) -> None:
    asked = plans(source, 1)[0]
    text, model = calibration_text(asked), asked.model
    heads = model.num_kv_heads
    fine = list(observe(model, text, POOL_MOMENTS, heads, CPU))
    assert [seen.layer for seen in fine] == model.layers
    for kv in (kv for kv in range(1, heads) if heads % kv == 0):
        for finest, again in zip(fine, observe(model, text, POOL_MOMENTS, kv, CPU)):
            alone, size = again.moments, heads // kv
            merged = finest.moments.merged([list(range(at, at + size)) for at in range(0, heads, size)])
            for name in POOL_MOMENTS:
                scale = alone[name].abs().max()
                torch.testing.assert_close(merged[name] / scale, alone[name] / scale, rtol=0, atol=1e-5)


def test_a_pass_that_stops_early_leaves_nothing_behind(source: Path) -> None:
    """Without the garbage collector: on a GPU a text's batches fill the memory long before Python looks."""
    asked = plans(source, 1)[0]
    runner, state = _start(asked.model, calibration_text(asked), CPU)
    runner.model.load_layer(0)
    rows, at = slice(0, 8), torch.arange(4)
    passes = [
        lambda: runner.attention_input(0, state, 0, rows),
        lambda: runner.head_outputs(0, state, 0, rows),
        lambda: runner.seen(0, state, 0, rows, at),
    ]
    for run in passes:
        run()

    def alive() -> int:
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        for run in passes:
            run()
            assert alive() == before
    finally:
        gc.enable()


class Circle:
    """Holds its tensors until the garbage collector looks, as an exception and a frame of its traceback do."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors, self.me = tensors, self


def test_what_a_layer_leaves_behind_is_freed_before_the_next(source: Path) -> None:
    asked = plans(source, 1)[0]
    text, circles = calibration_text(asked), []
    gc.collect()
    gc.disable()  # as good as: a few large tensors never start it
    try:
        for seen in observe(asked.model, text, POOL_MOMENTS, 1, CPU):
            assert gc.get_freeze_count() > 10_000  # or each search looks through everything
            assert all(circle() is None for circle in circles)
            circles.append(weakref.ref(Circle(seen.inputs)))
            assert circles[-1]() is not None
    finally:
        gc.enable()
    assert len(circles) == len(asked.model.layers)
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("grouping", ["contiguous", "similar"])
def test_every_count_comes_out_of_one_pass(source: Path, tmp_path: Path, monkeypatch, grouping: str) -> None:
    counts, loads = (4, 2, 1), []
    load = LayerwiseModel.load_layer

    def counted(self: LayerwiseModel, layer: int) -> None:
        loads.append(layer)
        load(self, layer)

    monkeypatch.setattr(LayerwiseModel, "load_layer", counted)
    asked = plans(source, *counts, grouping=grouping)
    for kv in counts:
        (tmp_path / str(kv)).mkdir()
    together = [FinishedLayers(tmp_path / str(kv)) for kv in counts]
    facts = calibrate_many(asked, together, CPU, None)
    assert loads == list(range(len(asked[0].model.layers)))
    assert facts["tokens"] == 2048
    for kv, step, finished in zip(counts, asked, together):
        (tmp_path / f"alone-{kv}").mkdir()
        alone = FinishedLayers(tmp_path / f"alone-{kv}")
        calibrate_many([step], [alone], CPU, None)
        for layer in step.model.layers:
            assert finished.facts[layer]["groups"] == alone.facts[layer]["groups"]
            # Singular vectors are found up to a sign, so what is compared is what queries, keys and values compute.
            both = [
                split(step.model.family, step.pooled.config, layer, folder(layer), kv).to(torch.float32)
                for folder in (alone, finished)
            ]
            assert max(reconstruction_error(*both)) < 1e-3
            assert max(reconstruction_error(step.model.heads(layer).to(torch.float32), both[1])) > 1e-2


def test_what_follows_its_own_drift_cannot_share_a_pass(source: Path, tmp_path: Path) -> None:
    asked = plans(source, 2, 1, refit=True)
    assert all(part.refit for part in job_of(asked[0]).layers.values())
    with pytest.raises(ValueError, match="closed forms"):
        calibrate_many(asked, [FinishedLayers(tmp_path)] * 2, CPU, None)


def test_checkpoints_of_every_count_are_written(source: Path, tmp_path: Path) -> None:
    done = convert_many(source, {kv: tmp_path / str(kv) for kv in (8, 4, 2)}, method="svd", **TEXT)
    alone = convert(source, tmp_path / "alone", num_key_value_heads=2, method="svd", **TEXT)
    for kv, conversion in done.items():
        assert conversion.plan.kv == kv
        assert verify(tmp_path / str(kv)).plain
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(kv))
        assert model.config.num_key_value_heads == kv
    assert done[2].layers[0]["value_error"] == pytest.approx(alone.layers[0]["value_error"], abs=1e-4)
    assert done[4].layers[0]["value_error"] < done[2].layers[0]["value_error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "8", "alone"]
    with pytest.raises(UsageError, match="one by one"):
        convert_many(source, {2: tmp_path / "x"}, method="svd", refit=True, **TEXT)
