"""Recipes run: every stage once, nothing twice, what is damaged again, what was killed from where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rehead.checkpoints.manifest import verify_files
from rehead.errors import QualityError, UnsupportedError, UsageError, VerificationError
from rehead.recipes import run_recipe
from rehead.recipes.pipeline.launch import accelerate_config, error_of, why
from rehead.recipes.pipeline.record import FOLDER
from rehead.recipes.pipeline.run import CELLS, plan_recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KINDS = ["convert", "control", "uptrain", "evaluate", "evaluate"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_home) -> Path:
    """A folder in which the recipe has run to its end; tests that change it copy it."""
    home = write_home(tmp_path_factory.mktemp("finished"))
    result = run_recipe(str(home / "recipe.yaml"))
    assert [(outcome.kind, outcome.action) for outcome in result.stages] == [(kind, "done") for kind in KINDS]
    return home


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """The recipe's file, with a copy of what it made as its folder."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return finished / "recipe.yaml"


def actions(recipe: Path, out: Path, *settings: str) -> dict[str, list[str]]:
    """What a run does, by action."""
    found: dict[str, list[str]] = {"done": [], "skipped": []}
    for outcome in run_recipe(str(recipe), settings=settings, out=out).stages:
        found[outcome.action].append(outcome.name)
    return found


def test_everything_is_there(finished) -> None:
    out = finished / "out"
    plan = plan_recipe(str(finished / "recipe.yaml")).cells[0]
    for stage in plan.stages.values():
        folder = out / stage.name
        if stage.kind != "evaluate":
            verify_files(folder)
            assert (folder / "tokenizer.json").is_file()
        record = json.loads((out / FOLDER / f"{stage.name}.json").read_text())
        assert set(record["files"]) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    report = json.loads((out / "report.json").read_text())
    assert [(entry["label"], entry["stage"]) for entry in report["entries"]] == [
        ("2 KV heads, mean, converted", "converted"),
        ("2 KV heads, mean, uptrained", "uptrained"),
    ]
    before, after = (entry["texts"][0] for entry in report["entries"])
    assert after["kl"] < before["kl"]
    assert before["control"] is None
    assert after["control"] < after["baseline"]
    assert report["entries"][0]["kv_saving"] == 2
    run = report["trainings"][0]
    assert run["tokens"][-1] == 2048
    assert len(run["kl"]) >= 2
    # A report says what things are called, not where they lay.
    for name in ("report.html", "report.md", "report.json"):
        assert str(finished) not in (out / name).read_text()


def test_a_second_run_does_nothing(again, tmp_path) -> None:
    out = tmp_path / "out"
    report = (out / "report.html").read_bytes()
    done = actions(again, out)
    assert done["done"] == []
    assert [name.split("-")[0] for name in done["skipped"]] == KINDS
    assert (out / "report.html").read_bytes() == report


@pytest.mark.parametrize(
    ("kind", "harm"),
    [("convert", "remove"), ("convert", "flip"), ("convert", "unrecorded"), ("control", "truncate"),
     ("uptrain", "flip"), ("uptrain", "record"), ("uptrain", "unrecorded")],
)  # fmt: skip
def test_what_is_damaged_is_made_again_and_nothing_else(again, tmp_path, kind, harm) -> None:
    out = tmp_path / "out"
    folder = next(path for path in out.iterdir() if path.name.startswith(kind))
    whole = (folder / "model.safetensors").read_bytes()
    weights, record = folder / "model.safetensors", out / FOLDER / f"{folder.name}.json"
    if harm == "remove":
        shutil.rmtree(folder)
    elif harm == "flip":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "truncate":
        weights.write_bytes(whole[:-10])
    elif harm == "record":
        record.write_text("{")
    else:  # killed between the stage's last rename and its record
        record.unlink()
    assert actions(again, out)["done"] == [folder.name]
    # What came back is what was there, so nothing that was made from it has to be made again.
    assert weights.read_bytes() == whole
    assert actions(again, out)["done"] == []


def test_a_lost_evaluation_is_measured_again(again, tmp_path) -> None:
    out = tmp_path / "out"
    lost = next(path for path in out.iterdir() if path.name.startswith("evaluate-converted"))
    shutil.rmtree(lost)
    (out / "report.html").unlink()
    said: list[tuple[str, ...]] = []
    made = run_recipe(str(again), out=out, say=lambda *words: said.append(words)).stages
    assert [stage.name for stage in made if stage.action == "done"] == [lost.name]
    (line,) = (text for event, _, text in said if event == "run")
    at = [stage.name for stage in made].index(lost.name) + 1
    assert line.endswith(f"(stage {at} of {len(KINDS)})")
    assert (out / "report.html").is_file()


def test_changed_options_make_what_depends_on_them(again, tmp_path) -> None:
    out = tmp_path / "out"
    done = actions(again, out, "uptrain.learning_rate=0.002")["done"]
    assert [name.split("-")[0] for name in done] == ["control", "uptrain", "evaluate"]
    assert actions(again, out)["done"] == []


def test_changed_data_make_what_was_made_from_it(finished, tmp_path) -> None:
    home = tmp_path / "home"
    shutil.copytree(finished, home)
    path = home / "recipe.yaml"
    run_recipe(str(path))  # the copy lies elsewhere
    (home / "heldout.txt").write_text((home / "heldout.txt").read_text() + "We the people of this nation.\n" * 3)
    done = [outcome for outcome in run_recipe(str(path)).stages if outcome.action == "done"]
    # The held-out text is looked at while training, so the logs change, and weights that come out equal count as such.
    assert [outcome.kind for outcome in done] == ["control", "uptrain", "evaluate", "evaluate"]
    assert {outcome.reason for outcome in done} == {"its eval_data has changed", "its data has changed"}


def test_a_report_is_made_of_what_is_there_before_a_gate_fails(run, again, tmp_path) -> None:
    out = tmp_path / "out"
    code, _, err = run("run", again, "--out", out, "--set", "evaluate.fail_above={kl: 0.0000001}", "--quiet")
    assert code == 5
    assert "kl" in err
    assert "report.html" in err
    assert 'class="verdict failed"' in (out / "report.html").read_text()


def test_the_command_opens_with_the_verdict(run, again, tmp_path) -> None:
    code, out, err = run("run", again, "--out", tmp_path / "out")
    assert code == 0
    assert "a KV cache 2 times smaller at" in out.replace("\n", " ")
    assert "(4 KV heads to 2, mean, uptrained on 2.05k tokens)." in out.replace("\n", " ")
    assert out.strip().splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert err.count("kept") == len(KINDS)
    code, text, _ = run("run", again, "--out", tmp_path / "out", "--json")
    facts = json.loads(text)
    assert {stage["action"] for stage in facts["stages"]} == {"skipped"}
    assert Path(facts["report"]["html"]).is_file()
    code, text, _ = run("run", again, "--out", tmp_path / "out", "--plan", "--json")
    assert {row["action"] for row in json.loads(text)["stages"]} == {"keep"}


def test_missing_inputs_are_one_line(run, home) -> None:
    for setting, says in (("uptrain.data=nowhere.txt", "nowhere.txt"), ("model=./nowhere", "no such folder")):
        code, _, err = run("run", home / "recipe.yaml", "--set", setting, "--out", home / "o", "--quiet")
        assert code == 2, err
        assert says in err
        assert len(err.strip().splitlines()) == 1


SWEEP = """
sweep:
  convert.num_key_value_heads: [2, 1]
  start:
    mean: {convert.method: mean}
    first: {convert.method: first}
"""


def test_cells_run_apart_and_are_gathered(run, home) -> None:
    path = home / "sweep.yaml"
    text = (home / "recipe.yaml").read_text().replace("  num_key_value_heads: 2\n  method: mean\n", "  seed: 0\n")
    path.write_text(text + SWEEP)
    out = home / "out"
    code, text, _ = run("run", path, "--list-cells", "--json")
    table = json.loads(text)
    assert [cell["label"] for cell in table["cells"]] == [
        "2 KV heads, mean", "2 KV heads, first", "1 KV head, mean", "1 KV head, first",
    ]  # fmt: skip
    assert len(table["shared"]) == 1
    code, _, err = run("run", path, "--gather")
    assert code == 2
    assert "no cell has been evaluated" in err

    control = []
    for index in (0, 3):
        code, text, err = run("run", path, "--cell", index, "--json", "--quiet")
        assert code == 0, err
        control += [stage["action"] for stage in json.loads(text)["stages"] if stage["kind"] == "control"]
    assert control == ["done", "skipped"]
    assert (out / "cell-0" / "report.html").is_file()

    code, text, err = run("run", path, "--gather", "--json")
    assert code == 0, err
    report = json.loads(Path(json.loads(text)["report"]["json"]).read_text())
    assert len(report["entries"]) == 4
    assert "2 of 4 cells: 1 (2 KV heads, first), 2 (1 KV head, mean)" in report["notes"][0]

    code, text, err = run("run", path, "--json")
    assert code == 0, err
    done = [stage["kind"] for stage in json.loads(text)["stages"] if stage["action"] == "done"]
    assert sorted(done) == ["convert"] * 2 + ["evaluate"] * 4 + ["uptrain"] * 2
    report = json.loads((out / "report.json").read_text())
    assert len(report["entries"]) == 8
    assert report["notes"] == []
    assert {entry["series"] for entry in report["entries"]} == {"mean", "first"}
    assert json.loads((out / CELLS).read_text())["recipe"] == "tiny"


@pytest.mark.skipif(fcntl is None, reason="locks otherwise")
def test_a_stage_that_another_run_is_making_is_waited_for(again, tmp_path) -> None:
    out = tmp_path / "out"
    name = next(path.name for path in out.iterdir() if path.name.startswith("control"))
    # Another process's lock, as far as the system is concerned: it belongs to the open file.
    held = os.open(out / FOLDER / f"{name}.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    heard: list[tuple[str, str]] = []

    def say(event: str, kind: str, text: str) -> None:
        heard.append((event, kind))
        if event == "wait":
            threading.Timer(0.2, fcntl.flock, (held, fcntl.LOCK_UN)).start()

    result = run_recipe(str(again), out=out, say=say)
    os.close(held)
    assert ("wait", "control") in heard
    assert heard.index(("wait", "control")) < heard.index(("skip", "control"))
    assert {outcome.action for outcome in result.stages} == {"skipped"}


def test_a_cell_that_fails_does_not_stop_the_others(run, home) -> None:
    path = home / "sweep.yaml"
    text = (home / "recipe.yaml").read_text().partition("convert:")[0]
    text += "evaluate: {data: heldout.txt, tokens: 256, window: 64, conventions: [disjoint], resamples: 20}\n"
    path.write_text(text + "sweep: {convert.num_key_value_heads: [3, 2]}\n")
    code, _, err = run("run", path, "--quiet")
    assert code == 2
    assert "1 of 2 cells failed" in err
    assert "does not divide" in err
    report = json.loads((home / "out" / "report.json").read_text())
    assert [entry["label"] for entry in report["entries"]] == ["2 KV heads"]
    assert "1 of 2 cells: 0 (3 KV heads)" in report["notes"][0]


def test_killed_runs_go_on(home) -> None:
    """SIGKILL while uptraining: the next run does what is left, and ends with the weights of a run never killed."""
    path, settings = str(home / "recipe.yaml"), ["uptrain.tokens=8k", "uptrain.eval_data=[]", "control=false"]
    run_recipe(path, settings=settings, out=home / "whole")
    flags = [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rehead.cli", "run", path, "--quiet", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list((home / "out").glob(".uptrain*/step-????????")):
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    done = [outcome.kind for outcome in run_recipe(path, settings=settings).stages if outcome.action == "done"]
    assert done == ["uptrain", "evaluate", "evaluate"]
    log = next((home / "out").glob("uptrain-*")) / "training-log.jsonl"
    assert '"event": "resume"' in log.read_text()
    one, other = (next((home / name).glob("uptrain-*")) / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert (home / "out" / "report.html").is_file()


def test_a_new_model_is_made_and_trained(home) -> None:
    path = home / "new.yaml"
    path.write_text(
        "name: new\ndevice: cpu\n"
        "new: {data: train.txt, vocab_size: 280, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,\n"
        "      num_attention_heads: 4, num_key_value_heads: 4}\n"
        "uptrain: {data: train.txt, loss: ce, tokens: 1024, batch_tokens: 256, seq_length: 32}\n"
        "evaluate: {data: heldout.txt, tokens: 256, window: 32, conventions: [disjoint], resamples: 20}\n"
    )
    result = run_recipe(str(path))
    assert [outcome.kind for outcome in result.stages] == ["new", "uptrain", "evaluate"]
    text = json.loads(result.report.json.read_text())["entries"][0]["texts"][0]
    assert text["perplexity"] < text["baseline"]


# accelerate starts a single process from this, whatever number is asked for.
ALONE = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nmixed_precision: 'no'\n"


@pytest.mark.slow
def test_uptraining_in_two_processes(run, home) -> None:
    path = home / "recipe.yaml"
    text = path.read_text() + "launch: {processes: 2, config: ddp}\ncontrol: false\n"
    path.write_text(text)
    code, _, err = run("run", path, "--quiet")
    assert code == 0, err
    manifest = json.loads((next((home / "out").glob("uptrain-*")) / "rehead.json").read_text())
    assert manifest["uptraining"]["processes"] == 2
    (home / "alone.yaml").write_text(ALONE)
    path.write_text(text.replace("config: ddp", "config: alone.yaml"))
    code, _, err = run("run", path, "--quiet")
    assert code == 2
    assert "accelerate started 1 process where 2 were asked for" in err
    # A mistake in the launched processes is the same one line as anywhere.
    path.write_text(text.replace("train.txt#lines", "nowhere.txt"))
    code, _, err = run("run", path, "--quiet")
    assert code == 2
    assert "nowhere.txt" in err
    assert len(err.strip().splitlines()) == 1


def test_errors_keep_their_codes() -> None:
    for code, kind in ((2, UsageError), (3, UnsupportedError), (4, VerificationError), (5, QualityError)):
        error = error_of("x", code)
        assert type(error) is kind
        assert str(error) == "x"
    assert (error_of("x", 130).exit_code, error_of("x", 143).exit_code) == (130, 143)


def test_launch_configs_are_found() -> None:
    assert accelerate_config("fsdp2").is_file()
    assert accelerate_config("ddp").is_file()
    with pytest.raises(UsageError, match="ddp or fsdp2"):
        accelerate_config("fsdp3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "is no YAML in line 2"),
        ("- a", "is no mapping"),
        ("", "is no mapping"),
        ("num_machines: 2", "num_machines is not 1"),
        (b"\xff\xfe\x81", "is not UTF-8 text"),
    ],
)
def test_a_wrong_launch_config_is_refused_before_any_stage(run, home, text, reason) -> None:
    config = home / "mine.yaml"
    config.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())
    path = home / "recipe.yaml"
    path.write_text(path.read_text() + "launch: {processes: 2, config: mine.yaml}\n")
    code, _, err = run("run", path, "--quiet")
    assert code == 2
    assert str(config) in err
    assert reason in err
    assert len(err.strip().splitlines()) == 1
    assert not (home / "out").exists()


def test_other_files_beside_a_missing_config_are_not_offered(tmp_path) -> None:
    (tmp_path / "notes.yaml").write_text("a: 1\n")
    with pytest.raises(UsageError, match=r"give an accelerate config file or ddp or fsdp2$"):
        accelerate_config(str(tmp_path / "nowhere.yaml"))


CLOSING = """\
warning: the data has 11,859 tokens, so each is seen 5.1 times; give more data or fewer --tokens
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
  exitcode  : {code} (pid: 31341)
  traceback : {traceback}
============================================================
"""


def test_why_launched_processes_ended_is_said_in_their_words() -> None:
    killed = CLOSING.format(code=-9, traceback="Signal 9 (SIGKILL) received by PID 31341")
    assert why(1, killed) == "one was killed by SIGKILL"
    assert why(-9, "warning: give more data") == "the launcher was killed by SIGKILL"
    broken = CLOSING.format(code=1, traceback="To enable traceback see: https://example.org")
    assert why(1, f"[rank0]: ValueError: no such thing\n{broken}") == "ValueError: no such thing"
    assert why(1, broken) == "one ended with code 1; see its output"
