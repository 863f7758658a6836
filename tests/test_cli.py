"""The command line: every mistake ends in one line and the right exit code; every command speaks JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rehead import __version__
from rehead.cli import COMMANDS, LEAVES
from rehead.console import progress_bar
from rehead.recipes.training.commands import training_bar


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.save_tiny("llama", folder)
    return folder


def heads(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def test_bare_call_shows_help(run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "convert" in out
    assert "inspect" in out


def test_inspect_and_plan_agree_on_the_cache(run, llama) -> None:
    code, out, _ = run("inspect", llama, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["num_key_value_heads"] == heads(llama)
    target = min(map(int, facts["can_convert_to"]))
    code, out, _ = run("plan", llama, "--kv-heads", target, "--json")
    plan = json.loads(out)
    assert plan["kv_bytes_per_token"] == {
        "before": facts["kv_bytes_per_token"],
        "after": facts["can_convert_to"][str(target)],
    }
    assert {change["name"].split(".")[-2] for change in plan["changes"]} == {"k_proj", "v_proj"}
    for words in (("inspect", llama), ("plan", llama, "--kv-heads", target), ("families",)):
        code, out, _ = run(*words)
        assert code == 0
        assert len(out.splitlines()) > 3


def test_convert_then_verify(run, llama, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("convert", llama, out, "--kv-heads", 1, "--json")
    assert code == 0
    assert json.loads(text)["num_key_value_heads"]["after"] == 1
    assert heads(out) == 1
    code, text, _ = run("verify", out, "--source", llama, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["against_source"]["mean_kl"] > 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "multi-query-attention" in card
    victim = out / "model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    code, _, err = run("verify", out)
    assert code == 4
    assert "model.safetensors" in err


def test_same_number_of_heads_is_exact_and_verified_so(run, llama, tmp_path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("convert", llama, out, "--kv-heads", heads(llama), "--method", "svd", "--refit")
    assert code == 0
    assert "calibration" not in text
    assert "refit" not in text
    planned = ("plan", llama, "--kv-heads", 1, "--method", "svd", "--calibration-length")
    positions = json.loads((llama / "config.json").read_text())["max_position_embeddings"]
    assert positions < 2048
    assert f"sequences of 16 and {positions}" in run(*planned, "16,2048")[1]
    assert f"sequences of {positions}" in run(*planned[:-1])[1]
    assert "sequences of 100" in run(*planned[:-1], "--calibration-tokens", 100)[1]
    assert "128,000 tokens of" in run(*planned[:-1], "--calibration-tokens", "128k")[1]
    code, _, err = run(*planned[:-1], "--calibration-tokens", "some")
    assert code == 2
    assert "write 8000000, 8M or 32Ki" in err
    expected, written = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == written.keys()
    assert all(torch.equal(expected[name], written[name]) for name in expected)
    code, text, _ = run("verify", out, "--source", llama, "--json")
    assert code == 0
    assert json.loads(text)["against_source"]["max_difference"] == 0


def test_dtype_and_shards(run, llama, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("convert", llama, out, "--kv-heads", 1, "--dtype", "bfloat16", "--max-shard-size", "20KB")[0] == 0
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    assert run("verify", out)[0] == 0


BAD = [
    # (what is done to a copy of the model, extra arguments, exit code, words of the one line)
    ("", ["--kv-heads", "3"], 2, "does not divide"),
    ("", ["--kv-heads", "64"], 2, "cannot add"),
    ("", ["--kv-heads", "0"], 2, "1 or more"),
    ("", ["--kv-heads", "two"], 2, "is not a whole number"),
    ("", [], 2, "--kv-heads"),
    ("", ["--kv-heads", "1", "--method", "meen"], 2, "did you mean 'mean'"),
    ("", ["--kv-heads", "1", "--grouping", "simular"], 2, "did you mean 'similar'"),
    ("", ["--kv-heads", "1", "--dtype", "bf16"], 2, "bfloat16"),
    ("", ["--kv-heads", "1", "--max-shard-size", "5 bananas"], 2, "bananas"),
    ("", ["--kv-heads", "1", "--device", "warp"], 2, "warp"),
    ("", ["--kv-heads", "1", "--method", "svd", "--calibration", "nowhere.txt"], 2, "no such file"),
    ("empty text", ["--kv-heads", "1", "--method", "svd", "--calibration", "TEXT"], 2, "is empty"),
    ("nan", ["--kv-heads", "1"], 3, "layers.1.self_attn.k_proj.weight (layer 1)"),
    ("quantised", ["--kv-heads", "1"], 3, "quantised"),
    ("pickle", ["--kv-heads", "1"], 3, "pickled"),
    ("bert", ["--kv-heads", "1"], 3, "encoder"),
    ("bart", ["--kv-heads", "1"], 3, "encoder-decoder"),
    ("mamba", ["--kv-heads", "1"], 3, "attention"),
    ("remote", ["--kv-heads", "1"], 3, "remote code"),
    ("no type", ["--kv-heads", "1"], 3, "model_type"),
    ("lying heads", ["--kv-heads", "1"], 3, "config.json claims"),
    ("truncated", ["--kv-heads", "1"], 3, "model.safetensors"),
]


@pytest.mark.parametrize(("harm", "extra", "code", "says"), BAD, ids=[f"{b[0]} {' '.join(b[1])}".strip() for b in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(run, llama, tmp_path, harm, extra, code, says) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    for file in llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    harmed(model, harm)
    text = tmp_path / "TEXT"
    text.write_text("")
    status, _, err = run("convert", model, out, *[str(text) if word == "TEXT" else word for word in extra])
    assert status == code, err
    assert says in err, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TEXT", "model"]


def harmed(model: Path, harm: str) -> None:
    """Break a checkpoint in a named way."""
    config = json.loads((model / "config.json").read_text())
    weights = model / "model.safetensors"
    if harm == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif harm == "quantised":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif harm == "pickle":
        weights.rename(model / "pytorch_model.bin")
    elif harm in ("bert", "bart", "mamba"):
        config = {"model_type": harm, "architectures": ["X"]}
    elif harm == "remote":
        config |= {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    elif harm == "no type":
        config.pop("model_type")
    elif harm == "lying heads":
        config["num_key_value_heads"] = config["num_attention_heads"] // 2 or 1
        config["num_key_value_heads"] = 2 if heads(model) != 2 else 4
    elif harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    (model / "config.json").write_text(json.dumps(config))


def test_outputs_that_must_not_be_written(run, llama, tmp_path) -> None:
    out = tmp_path / "out"
    assert run("convert", llama, out, "--kv-heads", 1, "--quiet")[0] == 0
    before = (out / "rehead.json").read_bytes()
    for place in (out, llama, llama / "inside"):
        code, _, err = run("convert", llama, place, "--kv-heads", 1)
        assert code == 2, err
    assert (out / "rehead.json").read_bytes() == before
    assert not (llama / "inside").exists()
    assert run("convert", llama, out, "--kv-heads", 2, "--overwrite")[0] == 0
    assert heads(out) == 2


def test_errors_are_json_too(run, llama, tmp_path) -> None:
    code, out, _ = run("convert", llama, tmp_path / "out", "--kv-heads", 3, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


def test_unknown_command_suggests(run) -> None:
    code, _, err = run("convret")
    assert code == 2
    assert "convert" in err


def test_python_m_rehead_is_the_command_line(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rehead", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


def test_output_that_nobody_reads_or_that_is_full_is_no_traceback() -> None:
    for words, code in (("inspect ./nowhere --json", 2), ("families", 1)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", "rehead", *words.split()],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        os.close(write)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == (1 if code == 2 else 0), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rehead", "families"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 3
    assert done.stderr.startswith("error: standard output: no space left")
    assert len(done.stderr.splitlines()) == 1


def test_a_place_that_nobody_may_look_into_is_one_line(run, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret/config.json")

    monkeypatch.setattr("rehead.convert.inspection.open_known", refuse)
    code, out, err = run("inspect", "secret", "--json")
    assert code == 3
    assert err == "error: secret/config.json: permission denied; check the path and its permissions\n"
    assert json.loads(out)["exit_code"] == 3


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: memory is full; free some"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has"), ": 256.00 MiB more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503 bytes."),
            " bytes more",
        ),
    ],
)
def test_full_memory_is_one_line(run, monkeypatch, error, says) -> None:
    def fill(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("rehead.convert.convert", fill)
    code, out, err = run("convert", "x", "y", "--kv-heads", 1, "--json")
    assert code == json.loads(out)["exit_code"] == 3
    assert says in err
    assert err.count("\n") == 1
    monkeypatch.setattr("rehead.convert.convert", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        run("convert", "x", "y", "--kv-heads", 1)


def test_interrupted_says_what_is_left(run, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rehead.convert.inspection.open_known", stop)
    code, _, err = run("inspect", "x")
    assert (code, err.strip()) == (130, "error: interrupted")
    monkeypatch.setattr("rehead.convert.convert", stop)
    code, _, err = run("convert", "x", "y", "--kv-heads", 1)
    assert code == 130
    assert "nothing was written to OUT" in err
    assert set(LEAVES) <= set(COMMANDS)


def test_interrupted_after_the_output_says_so(run, llama, tmp_path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rehead.checkpoints.staging.Staging._unlock", stop)
    code, _, err = run("convert", llama, tmp_path / "out", "--kv-heads", 1, "--method", "mean")
    assert code == 130
    assert err.strip().endswith(f"error: interrupted; {tmp_path / 'out'} was written")
    assert (tmp_path / "out" / "rehead.json").is_file()


def test_long_work_leaves_lines_in_a_log(capsys, monkeypatch) -> None:
    """Where standard error is no terminal: nothing for short work, a line now and then for long, none when quiet."""
    clock = [0.0]
    monkeypatch.setattr("rehead.console.time.monotonic", lambda: clock[0])
    with progress_bar(quiet=False) as show:
        for layer in range(1, 101):
            show("layers", layer, 100)
            clock[0] += 1
    assert capsys.readouterr().err.split("\n") == [
        "layers 31%  69 s left", "layers 61%  39 s left", "layers 91%  9 s left", "",
    ]  # fmt: skip
    with training_bar(quiet=False) as (show, tell):
        tell({"event": "step", "step": 4, "loss": 0.5, "tokens_per_second": 1234.0})
        show("training", 4, 16)
        clock[0] += 31
        show("training", 5, 16)
        tell({"event": "note", "note": "something rare"})
    assert (
        capsys.readouterr().err
        == "training 31%  5 of 16 steps  loss 0.5  1,234 tokens/s  6 min left\nnote: something rare\n"
    )
    with progress_bar(quiet=True) as none, training_bar(quiet=True) as (also_none, _):
        assert none is None
        assert also_none is None


def test_an_output_without_the_signs_gets_question_marks() -> None:
    code = "from rehead import cli; cli.cli.callback = lambda: print('1 \u00d7 1'); cli.main([])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, b"1 ? 1".split(), b"")
