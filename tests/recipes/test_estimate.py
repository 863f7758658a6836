"""Dry runs: what they say they would do, that they write and load nothing, and that estimates meet what is measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from rehead.checkpoints.opening import open_source
from rehead.convert.budget.curve import curve
from rehead.errors import UsageError
from rehead.recipes import estimate, evaluate
from rehead.recipes.curve.dry_run import estimate_curve
from rehead.recipes.estimate import Cost, Estimate, Sketch
from rehead.recipes.evaluation.dry_run import estimate_evaluation, loaded_dtype
from rehead.recipes.scratch import NewModel, new_model
from rehead.recipes.training.dry_run import estimate_uptraining
from rehead.recipes.training.run import uptrain

LINES = [f"The year {year} brought {year * 7} bales and peace with all nations." for year in range(1500, 2000)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model whose arithmetic takes longer than Python around it, and a text."""
    folder = tmp_path_factory.mktemp("estimate")
    (folder / "text.txt").write_text("\n".join(LINES))
    shape = NewModel(
        vocab_size=290, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, dtype="float32",
    )  # fmt: skip
    new_model(folder / "model", LINES, shape)
    return folder


@pytest.fixture(autouse=True)
def of_the_process(monkeypatch: pytest.MonkeyPatch):
    """Both sides in seconds of this process, so that other work on the machine does not show."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    yield
    torch.set_num_threads(threads)


def options(place: Path, **more) -> dict:
    return {"data": [str(place / "text.txt")], "window": 128, "tokens": 2048, "device": "cpu", **more}


def test_an_evaluation_takes_about_what_was_estimated(place):
    model = str(place / "model")
    told = estimate_evaluation(model, baseline=model, **options(place))
    assert told.seconds.keys() == {"loading", "perplexity and KL", "samples"}
    start = time.process_time()
    evaluate(model, baseline=model, **options(place, resamples=1))
    took = time.process_time() - start
    guess = sum(told.seconds.values()) - told.seconds["loading"]  # reading a small file is no arithmetic
    assert guess / 1.6 < took < guess * 1.6 + 1


def test_an_uptraining_takes_about_what_was_estimated(place):
    arguments = {
        "data": [str(place / "text.txt")], "loss": "ce", "tokens": 2048, "batch_tokens": 512, "seq_length": 128,
        "device": "cpu",
    }  # fmt: skip
    told = estimate_uptraining(place / "model", place / "out", **arguments)
    assert not (place / "out").exists()
    assert told.facts["steps"].startswith("4 of 512 tokens")
    start = time.process_time()
    uptrain(place / "model", place / "out", **arguments)
    took = time.process_time() - start
    assert told.seconds["training"] / 1.6 < took < told.seconds["training"] * 1.6 + 1


def test_commands_say_it_and_leave_nothing(run, place, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a dry run reads no weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    before = sorted(place.iterdir())
    model, text = place / "model", place / "text.txt"
    small = ("--window", 64, "--tokens", 512)
    code, out, err = run("evaluate", model, "--data", text, *small, "--dry-run")
    assert code == 0, err
    assert "time    about " in out
    assert "memory  about " in out
    code, out, err = run("uptrain", model, place / "new", "--data", text, "--loss", "ce", "--tokens", 2048,
                         "--batch-tokens", 512, "--seq-length", 64, "--dry-run", "--json")  # fmt: skip
    facts = json.loads(out)
    assert code == 0, err
    assert facts["dry_run"]
    assert facts["total_seconds"] == pytest.approx(sum(facts["seconds"].values()))
    assert facts["facts"]["teacher"] == "none"
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate", "MODEL", "--out", "OUT", "--dry-run"], "--dry-run: measures nothing"),
        (["evaluate", "MODEL", "--damage", "--dry-run"], "give --baseline"),
        (["evaluate", "MODEL", "--data", "none.txt", "--dry-run"], "no such file"),
        (["uptrain", "MODEL", "OUT", "--data", "none.txt", "--loss", "ce", "--dry-run"], "no such file"),
        (["uptrain", "MODEL", "OUT", "--data", "TEXT", "--dry-run"], "needs a teacher"),
        (["uptrain", "MODEL", "OUT", "--data", "TEXT", "--loss", "ce", "--resume", "on", "--dry-run"], "auto or never"),
        (["uptrain", "MODEL", "OUT", "--data", "TEXT", "--loss", "ce", "--train", "atention", "--dry-run"],
         "did you mean 'attention'"),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would(run, place, words, says):
    names = {"MODEL": place / "model", "TEXT": place / "text.txt", "OUT": place / "new"}
    code, _, err = run(*(names.get(word, word) for word in words))
    assert code == 2
    assert says in err


def test_a_dry_run_takes_no_empty_folder(place):
    with pytest.raises(UsageError, match="OUT is empty"):
        estimate_uptraining(place / "model", "", data=[str(place / "text.txt")], loss="ce")


def test_a_gpu_loads_a_checkpoint_as_it_is_stored(place):
    source = open_source(place / "model")  # float32
    assert loaded_dtype("auto", torch.device("cuda"), source) == torch.float32
    assert loaded_dtype("float16", torch.device("cuda"), source) == torch.float16
    for info in list(source.tensors.values()):
        source.tensors[info.name] = replace(info, dtype="F16")
    assert loaded_dtype("auto", torch.device("cuda"), source) == torch.float16
    assert loaded_dtype("auto", torch.device("cpu"), source) == torch.float32


def test_costs_grow_with_the_layers():
    cost = Cost.fitted({1: 3.0, 4: 6.0})
    assert (cost.once, cost.layer, cost.of(30)) == (2.0, 1.0, 32.0)
    assert Cost.fitted({1: 3.0}).of(2) == 6.0
    assert Cost.fitted({1: 3.0, 4: 2.0}).of(30) == 3.0  # noise never makes more layers cheaper


@pytest.mark.parametrize(
    ("took", "device", "runs", "answer"),
    [
        ([0.9, 0.1, 0.3, 0.2], "cpu", 4, 0.2),  # the first only warms up
        ([11.0], "cpu", 1, 11.0),  # what takes seconds needs none
        ([4.0, 2.0, 3.0, 2.0], "cpu", 4, 2.5),
        ([11.0, 0.1, 0.3, 0.2], "cuda", 4, 0.2),  # where the first compiles kernels
        ([1.0, 11.0], "cuda", 2, 11.0),
    ],
)
def test_slow_work_is_timed_once(took, device, runs, answer, monkeypatch):
    done, now = [], [0.0]
    monkeypatch.setattr(estimate, "clock", lambda device: now[0])

    def work():
        now[0] += took[len(done)]
        done.append(1)

    assert estimate.timed(work, torch.device(device), 3) == pytest.approx(answer)
    assert len(done) == runs


def test_first_layers_keep_width_and_kinds():
    from rehead.benchmarks.tiny import tiny_model

    live = tiny_model("gemma3_text")
    layers = live.config.num_hidden_layers
    sketch = Sketch("m", live.config, layers, 1000, 4000)
    first = sketch.first_layers(1, torch.float32, torch.device("cpu"))
    assert len(first.model.layers) == 1
    assert first.config.hidden_size == live.config.hidden_size
    assert first.config.layer_types == live.config.layer_types[:1]
    assert live.config.num_hidden_layers == layers
    assert Estimate({"a": 30.0, "b": 90.0}, 2e9).rows()[0] == ("time", "about 2 min (a 30 s, b 2 min)")


def test_a_curve_takes_about_what_was_estimated(place):
    model, asked = str(place / "model"), {"calibration": [str(place / "text.txt")], "calibration_tokens": 1024}
    asked |= {"tokens": 512, "context": 256, "device": "cpu"}
    told = estimate_curve(model, **asked)
    assert told.seconds.keys() == {"loading", "survey", "measuring"}
    assert "convert --kv-cache" in told.facts
    start = time.process_time()
    curve(model, **asked)
    took = time.process_time() - start
    guess = sum(told.seconds.values()) - told.seconds["loading"]
    assert took / 1.6 < guess < took * 1.6
