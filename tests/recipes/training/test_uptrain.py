"""Uptraining from the outside: what it learns, what it writes, what it says."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rehead.checkpoints.manifest import verify_files
from rehead.convert import convert, verify
from rehead.data.tokens import load_tokenizer, token_stream
from rehead.errors import UsageError, VerificationError
from rehead.recipes import uptrain
from rehead.recipes.training.checkpoints import work_path


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("trained") / "out"
    events: list[dict] = []
    done = uptrain(
        tiny.student, out, **tiny.options(tokens=16384, eval_data=[tiny.held], eval_every=8), on_event=events.append
    )
    return done, out, events


def test_the_end_is_evaluated_whatever_the_interval(tiny, tmp_path: Path) -> None:
    uptrain(tiny.student, tmp_path / "out", **tiny.options(tokens=2048, eval_data=[tiny.held], eval_every=3))
    assert [event["step"] for event in _log(tmp_path / "out") if event["event"] == "evaluation"] == [0, 3, 4]


def test_the_student_comes_nearer_to_its_teacher(trained) -> None:
    done, out, events = trained
    evaluations = [event for event in _log(out) if event["event"] == "evaluation"]
    assert [event["step"] for event in evaluations] == [0, 8, 16, 24, 32]
    assert evaluations[-1]["kl"] < 0.4 * evaluations[0]["kl"]
    assert evaluations[-1]["top1_agreement"] > evaluations[0]["top1_agreement"]
    steps = [event for event in _log(out) if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 33))
    assert steps[-1]["tokens"] == done.tokens == 16384
    for event in steps:
        # Of the loss kd, the mean over counted tokens is the KL itself.
        assert event["loss"] == pytest.approx(event["kl"], rel=1e-4)
        assert min(event["tokens_per_second"], event["seconds"], event["peak_memory_bytes"]) > 0
    assert [event["event"] for event in events] == [event["event"] for event in _log(out)]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "end"


def test_out_is_a_plain_checkpoint_with_its_history(trained, tiny) -> None:
    done, out, _ = trained
    manifest = verify_files(out)
    assert verify(out, str(tiny.teacher)).against_source["mean_kl"] > 0
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.num_key_value_heads == 1
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in tiny.student.iterdir()} | {"training-log.jsonl"}
    student = json.loads((tiny.student / "rehead.json").read_text())
    assert manifest["conversion"] == {key: value for key, value in student.items() if key != "files"}
    assert manifest["uptraining"]["teacher"] == str(tiny.teacher)
    assert manifest["uptraining"]["last"]["step"]["step"] == 32
    assert not manifest["exact"]
    assert "## Uptraining" in (out / "README.md").read_text()
    assert not work_path(out).exists()
    assert done.as_json()["steps"] == 32


def test_a_modelling_file_goes_along(tiny, tmp_path: Path) -> None:
    """Trained, a model that no class of transformers can express still loads by its own file."""
    convert(tiny.teacher, tmp_path / "parallel", block="parallel")
    uptrain(tmp_path / "parallel", tmp_path / "out", **tiny.options(tokens=512))
    names = {path.name for path in (tmp_path / "parallel").iterdir()} | {"training-log.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    verify(tmp_path / "out")
    file = "modeling_rehead_parallel.py"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "parallel" / file).read_bytes()
    (tmp_path / "out" / file).unlink()
    manifest = json.loads((tmp_path / "out" / "rehead.json").read_text())
    manifest["files"].pop(file)
    (tmp_path / "out" / "rehead.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"modeling_rehead_parallel\.py, which is not there"):
        verify(tmp_path / "out")


def test_held_out_figures_are_those_of_a_plain_loop(trained, tiny) -> None:
    _, out, _ = trained
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tiny.teacher))
    windows = token_stream([tiny.held], load_tokenizer(out), 32768)
    windows = windows[: len(windows) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        ours, theirs = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    nll = -ours.gather(-1, windows[:, 1:, None]).mean()
    last = [event for event in _log(out) if event["event"] == "evaluation"][-1]
    assert last["kl"] == pytest.approx(kl, rel=1e-4)
    assert last["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert last["top1_agreement"] == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    assert last["tokens_counted"] == windows[:, 1:].numel()


def test_a_finished_command_is_not_run_again(trained, tiny) -> None:
    done, out, _ = trained
    before = (out / "rehead.json").stat().st_mtime_ns
    events: list[dict] = []
    again = uptrain(
        tiny.student, out, **tiny.options(tokens=16384, eval_data=[tiny.held], eval_every=8), on_event=events.append
    )
    assert (again.facts, events, (out / "rehead.json").stat().st_mtime_ns) == (done.facts, [], before)
    with pytest.raises(UsageError, match="already exists"):
        uptrain(tiny.student, out, **tiny.options(tokens=8192))


def test_gradients_do_not_depend_on_how_a_step_is_cut(tiny, tmp_path: Path) -> None:
    curves = []
    for micro in (1, 3, 16):
        events: list[dict] = []
        uptrain(
            tiny.student, tmp_path / str(micro), **tiny.options(micro_batch=micro, tokens=1536), on_event=events.append
        )
        curves.append([(e["loss"], e["gradient_norm"]) for e in events if e["event"] == "step"])
    for curve in curves[1:]:
        assert torch.tensor(curve).sub(torch.tensor(curves[0])).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ce"},
        {"loss": "kd+0.1*ce+0.5*js", "packing": "joined"},
        {"train": "attention", "learning_rates": {"k_proj": 2.0, "o_proj": 0.5}},
        {"gradient_checkpointing": True, "attention": "sdpa"},
        {"dtype": "bfloat16", "attention": "eager"},
        {"schedule": "wsd", "warmup": 2, "weight_decay": 0.1, "clip": 0.0, "streaming": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(tiny, tmp_path: Path, changes: dict) -> None:
    events: list[dict] = []
    options = tiny.options(eval_data=[tiny.held], eval_every=8, **changes)
    uptrain(tiny.student, tmp_path / "out", teacher=str(tiny.teacher), **options, on_event=events.append)
    figures = [event for event in events if event["event"] == "evaluation"]
    name = "perplexity" if changes.get("loss") == "ce" else "kl"
    assert figures[-1][name] < 0.9 * figures[0][name]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_does_not_train_stays_byte_for_byte(tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    events: list[dict] = []
    uptrain(tiny.student, tmp_path / "out", **tiny.options(train="attention"), on_event=events.append)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny.student, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "self_attn" in name}
    # Everything else is the teacher's too, and was held once.
    frozen = sum(w.numel() * 4 for name, w in before.items() if "self_attn" not in name)
    assert events[0]["shared_bytes"] == frozen


def test_pretraining_from_scratch_needs_no_teacher(tiny, tmp_path: Path) -> None:
    events: list[dict] = []
    uptrain(tiny.teacher, tmp_path / "out", **tiny.options(loss="ce", eval_data=[tiny.held]), on_event=events.append)
    figures = [event for event in events if event["event"] == "evaluation"]
    assert figures[-1]["perplexity"] < 0.5 * figures[0]["perplexity"]
    assert "kl" not in figures[-1]
    with pytest.raises(UsageError, match="give --teacher"):
        uptrain(tiny.teacher, tmp_path / "other", **tiny.options())


def test_a_gpu_out_of_memory_is_given_fewer_rows(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rehead.checkpoints.stream import ResourceError
    from rehead.recipes.training.losses import StudentWithLoss

    plain: list[dict] = []
    uptrain(tiny.student, tmp_path / "plain", **tiny.options(), on_event=plain.append)
    forward = StudentWithLoss.forward

    allocated: list[weakref.ref] = []
    left: list[bool] = []

    def small(self, input_ids, *arguments, **options):
        if len(input_ids) > 5:
            activations = torch.empty(8)
            allocated.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(StudentWithLoss, "forward", small)
    # What a failed pass had allocated is free by the time the cache is given back.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(allocated[-1]() is not None))
    events: list[dict] = []
    uptrain(tiny.student, tmp_path / "out", **tiny.options(), on_event=events.append)
    notes = [event["note"] for event in events if event["event"] == "note"]
    assert notes == [f"out of memory; {rows} rows in a forward pass from here on" for rows in (8, 4)]
    assert left == [False, False]
    curves = [[event["loss"] for event in told if event["event"] == "step"] for told in (plain, events)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    with pytest.raises(ResourceError, match=r"out of GPU memory at step 1 with 6 rows .* --micro-batch") as found:
        uptrain(tiny.student, tmp_path / "other", **tiny.options(micro_batch=6))
    assert found.value.exit_code == 3


def test_trackers_of_accelerate(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    told: dict[str, list] = {"log": [], "config": [], "end": []}

    class Notebook:
        requires_logging_directory = True

        def __init__(self, run: str, logging_dir: str) -> None:
            assert (run, logging_dir) == ("out", str(tmp_path / "runs"))

        def store_init_configuration(self, values: dict) -> None:
            told["config"].append(values)

        def log(self, values: dict, step: int) -> None:
            told["log"].append((step, values))

        def finish(self) -> None:
            told["end"].append(True)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    with pytest.raises(UsageError, match="--tracker notebook: is not installed"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options(tracker="notebook"))
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["notebook"])
    uptrain(tiny.student, tmp_path / "out", **tiny.options(tracker="notebook", eval_data=[tiny.held], eval_every=8))
    assert [step for step, _ in told["log"]] == [0, *range(1, 9), 8]
    assert told["log"][1][1].keys() >= {"step/loss", "step/learning_rate", "step/tokens_per_second"}
    assert told["log"][0][1].keys() >= {"evaluation/kl", "evaluation/perplexity"}
    assert told["config"][0]["tokens"] == 4096
    assert told["end"] == [True]


def test_a_run_that_leads_away_from_the_teacher_says_so(tiny, tmp_path: Path, capsys) -> None:
    """A far too high rate: a log that nobody reads would show a student that is worse than at its start."""
    said: dict[str, list[str]] = {}
    for name, rate in {"near": 1e-3, "away": 3.0}.items():
        events: list[dict[str, Any]] = []
        options = tiny.options(tokens=4096, eval_data=[tiny.held], learning_rate=rate, clip=0.0)
        done = uptrain(tiny.student, tmp_path / name, teacher=str(tiny.teacher), **options, on_event=events.append)
        said[name] = [event["note"] for event in events if event["event"] == "warning"]
        figures = next(value for key, value in done.last.items() if key.startswith("evaluation "))
        first = next(event for event in events if event["event"] == "evaluation")
        assert figures["at_start"] == {"kl": first["kl"]}
    assert not said["near"]
    assert len(said["away"]) == 1
    assert "further away than at the start" in said["away"][0]
    assert "lower --lr" in said["away"][0]


def test_repeats_that_no_document_is_long_enough_for_are_warned_of(tiny, tmp_path: Path) -> None:
    said: dict[str, list[str]] = {}
    for packing in ("isolated", "joined"):
        events: list[dict[str, Any]] = []
        options = tiny.options(tokens=1024, seq_length=256, repeats=0.5, packing=packing, loss="kd+0.1*ce")
        uptrain(tiny.student, tmp_path / packing, **options, on_event=events.append)
        said[packing] = [event["note"] for event in events if event["event"] == "warning"]
    assert not said["joined"]
    assert len(said["isolated"]) == 1
    assert "--packing joined does over the whole row" in said["isolated"][0]
