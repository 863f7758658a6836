"""Two processes give the loss curve of one, with repeated parameters and with sharded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from two_ranks import LEAVE, torchrun

from rehead.errors import UsageError
from rehead.recipes import uptrain
from rehead.recipes.training.processes import join_processes

# Both runs in one launch: most of a launch is importing torch, twice.
_WORKER = """
import json, os, signal, sys
from rehead.recipes import uptrain
from rehead.recipes.training.loop import Interrupted

student, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
unnamed = {**options, "learning_rate": None, "tokens": 1024}
uptrain(student, out + "/ddp", **options)
uptrain(student, out + "/rate-ddp", **unnamed)
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
uptrain(student, out + "/fsdp", **options)
uptrain(student, out + "/rate-fsdp", **unnamed)

def interrupted(folder, number, code):
    def stop(event):  # in the main process alone; the other must stop at the same step, for the same reason
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), number)

    try:
        uptrain(student, out + folder, **{**options, "checkpoint_every": 0}, on_event=stop)
        raise SystemExit("was not interrupted")
    except Interrupted as error:
        assert error.exit_code == code, (os.environ["RANK"], error.exit_code)

interrupted("/ended", signal.SIGTERM, 143)
interrupted("/resumed", signal.SIGINT, 130)
uptrain(student, out + "/resumed", **{**options, "checkpoint_every": 0})
uptrain(student, out + "/half", **{**options, "dtype": "bfloat16", "train": "attention", "micro_batch": None})
"""


def _events(out: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def test_two_processes_give_the_curve_of_one(tiny, tmp_path: Path) -> None:
    # A batch whose rows hold unequal numbers of counted tokens, in micro-batches: a mean of means would differ.
    options = tiny.options(tokens=2048, micro_batch=3, eval_data=[tiny.held], eval_every=2)
    uptrain(tiny.student, tmp_path / "one", **options)
    uptrain(tiny.student, tmp_path / "rate-one", **{**options, "learning_rate": None, "tokens": 1024})
    (tmp_path / "worker.py").write_text(_WORKER + LEAVE)
    done = torchrun(str(tmp_path / "worker.py"), str(tiny.student), str(tmp_path), json.dumps(options))
    assert done.returncode == 0, done.stderr[-2000:]
    one = tmp_path / "one"
    for name in ("ddp", "fsdp"):
        two = tmp_path / name
        start = _events(two, "start")[0]
        assert (start["processes"], start["sharded"]) == (2, name == "fsdp")
        for kind, figures in (("step", ("loss", "gradient_norm")), ("evaluation", ("kl", "perplexity"))):
            mine, other = _events(one, kind), _events(two, kind)
            assert len(mine) == len(other) > 2
            for event, same in zip(mine, other):
                for figure in figures:
                    assert same[figure] == pytest.approx(event[figure], abs=1e-4, rel=1e-5), (name, kind, event["step"])
        weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            assert (weight - others[key]).abs().max() < 1e-3 * weight.abs().max(), (name, key)
        assert _events(two, "checkpoint")
    # A rate that is not named is the same number in both processes, and that of one.
    rates = [_events(tmp_path / f"rate-{name}", "note")[0] for name in ("one", "ddp", "fsdp")]
    assert rates[0] == rates[1] == rates[2]
    # Interrupted and gone on from a checkpoint of gathered shards, which each process took its part of.
    assert _events(tmp_path / "resumed", "resume")[0]["step"] in (2, 3)
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "fsdp"))
    assert all((weight - resumed[key]).abs().max() == 0 for key, weight in whole.items())
    # Sharded bfloat16 computation on float32 shards, part of it frozen, learns too.
    half = _events(tmp_path / "half", "evaluation")
    assert half[-1]["kl"] < 0.9 * half[0]["kl"]


def test_a_batch_that_cannot_be_shared(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rehead.recipes.training import run
    from rehead.recipes.training.processes import Processes

    monkeypatch.setattr(run, "join_processes", lambda device: Processes(0, 3, run.torch.device("cpu")))
    with pytest.raises(UsageError, match="16 rows of 32 cannot be shared evenly by 3 processes"):
        uptrain(tiny.student, tmp_path / "out", **tiny.options())


def test_one_process_joins_nothing() -> None:
    run = join_processes("cpu")
    assert (run.rank, run.world, run.main, run.sharded) == (0, 1, True, False)
    assert run.agreed(5) == 5


def test_launch_configurations_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    folder = Path(__file__).parents[3] / "recipes" / "library" / "accelerate"
    files = sorted(folder.glob("*.yaml"))
    assert [file.stem for file in files] == ["ddp", "fsdp2"]
    for file in files:
        config = load_config_from_file(str(file))
        assert isinstance(config, ClusterConfig)
        assert config.mixed_precision == "no"
        assert yaml.safe_load(file.read_text())["distributed_type"] == config.distributed_type
    assert load_config_from_file(str(folder / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
