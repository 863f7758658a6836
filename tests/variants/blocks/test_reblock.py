"""Blocks in checkpoints: there and back without a bit lost, the definition in between, refusals in a line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import IDS, loaded, logits

from rehead.convert import convert, plan, verify
from rehead.convert.commands import convert_command
from rehead.errors import UnsupportedError, UsageError
from rehead.healing.finished import FinishedLayers
from rehead.variants.layer_choice import parse_layers

CALIBRATION = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 32}
CARRIED = ["llama", "mistral", "qwen2", "qwen3", "granite", "starcoder2"]
SWITCHED = ["gpt_neox-serial", "falcon-rw", "stablelm"]


def parallel_by_definition(model, layers: set[int]) -> torch.Tensor:
    """Logits of a serial model whose chosen layers give their FFN the block's input, norms and all, by hooks alone."""
    handles = []
    for index, layer in enumerate(
        model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    ):
        if index not in layers:
            continue
        kept: list[torch.Tensor] = []
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, kept=kept: kept.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        norm = layer.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda m, args, kept=kept: (kept.pop(),)))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


@pytest.mark.parametrize("name", [*CARRIED, *SWITCHED])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Parallel computes the definition's function, loads, and generates with a cache what it computes without one."""
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source = tiny.tiny_model(name)
    source.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "parallel", block="parallel")
    facts = done.plan.as_json()
    plain = name in SWITCHED
    assert facts["block"] == {"before": "serial", "after": "parallel", "layers": [0, 1], "plain": plain}
    assert not facts["exact"]
    assert (tmp_path / "parallel" / "modeling_rehead_parallel.py").exists() is not plain
    model, wanted = loaded(tmp_path / "parallel"), parallel_by_definition(source, {0, 1})
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - logits(source)).abs().max()) > 1e-2, "the two forms must differ, or nothing was shown"
    assert verify(tmp_path / "parallel", str(tmp_path / "source")).cache_error < 1e-5
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "proj" in n or "dense" in n)
    back = convert(tmp_path / "parallel", tmp_path / "back", block="serial")
    assert back.plan.config.model_type == source.config.model_type
    if name == "stablelm":  # its norms were folded into one
        torch.testing.assert_close(logits(loaded(tmp_path / "back")), logits(source), atol=1e-5, rtol=1e-5)
    elif name == "falcon-rw":
        assert set(bytes_of(tmp_path / "back").values()) == set(bytes_of(tmp_path / "source").values())
        assert torch.equal(logits(loaded(tmp_path / "back")), logits(source))
    else:
        assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "source")
        assert torch.equal(logits(loaded(tmp_path / "back")), logits(source))


def test_some_layers_and_then_more(tmp_path: Path) -> None:
    source = tiny.tiny_model("llama")
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "one", block="parallel", layers="1")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "one")), parallel_by_definition(source, {1}), atol=1e-5, rtol=1e-5
    )
    facts = convert(tmp_path / "one", tmp_path / "two", block="parallel", layers=[0, 1]).plan.as_json()
    assert facts["block"]["before"] == "parallel in 1 of 2 layers, else serial"
    assert facts["block"]["layers"] == [0]
    assert loaded(tmp_path / "two").config.parallel_layers == [0, 1]


def test_with_fewer_heads_healed_and_wider(tmp_path: Path) -> None:
    """Every step in one run: pooling calibrated across the change, the writers refitted, the FFN widened."""
    source = tiny.save_tiny("llama-mha", tmp_path / "source")
    both = {"num_key_value_heads": 2, "block": "parallel", "method": "svd", **CALIBRATION}
    convert(source, tmp_path / "raw", **both)
    done = convert(source, tmp_path / "refit", refit=True, fit=5, reinvest="ffn", multiple_of=8, **both)
    for facts in done.layers.values():
        assert facts["block_error"][1] < facts["block_error"][0]
        assert facts["logit_error"][1] <= facts["logit_error"][0]
    model = loaded(tmp_path / "refit")
    assert model.config.num_key_value_heads == 2
    assert model.config.intermediate_size > 48
    before, after = (verify(tmp_path / name, str(source)).against_source["mean_kl"] for name in ("raw", "refit"))
    assert after < before
    assert "`import rehead`" in (tmp_path / "refit" / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "gpt_neox-serial", "falcon-rw", "granite"])
def test_refit_heals_the_change_alone(name: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(name, tmp_path / "source")
    convert(source, tmp_path / "raw", block="parallel")
    done = convert(source, tmp_path / "refit", block="parallel", refit=True, **CALIBRATION)
    assert all(facts["block_error"][1] < 0.5 * facts["block_error"][0] for facts in done.layers.values())
    before, after = (verify(tmp_path / n, str(source)).against_source["mean_kl"] for n in ("raw", "refit"))
    assert after < 0.25 * before
    serial = convert(tmp_path / "refit", tmp_path / "serial", block="serial", refit=True, **CALIBRATION)
    assert all(facts["block_error"][1] < facts["block_error"][0] for facts in serial.layers.values())
    assert verify(tmp_path / "serial", str(tmp_path / "refit")).against_source["mean_kl"] < before


def test_a_killed_run_with_every_step_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    options = {
        "num_key_value_heads": 2, "block": "parallel", "layers": [1], "refit": True, "reinvest": "ffn",
        "multiple_of": 8, **CALIBRATION,
    }  # fmt: skip
    convert(source, tmp_path / "whole", **options)
    save = FinishedLayers.save

    def stop_after_first(*args) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FinishedLayers, "save", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", resume=True, **options)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", resume=True, **options)
    files = [json.loads((tmp_path / name / "rehead.json").read_text())["files"] for name in ("whole", "out")]
    assert files[0] == files[1]
    assert "modeling_rehead_parallel.py" in files[0]


def test_auto_takes_what_the_budget_allows(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    done = convert(source, tmp_path / "all", block="parallel", layers="auto", kl_budget=10.0, **CALIBRATION)
    chosen = json.loads((tmp_path / "all" / "rehead.json").read_text())["calibration"]["chosen_layers"]
    assert done.plan.reblocked == (0, 1)
    (first, one), (_, both) = chosen["path"]
    assert 0 < one < both <= 10
    few = convert(source, tmp_path / "few", block="parallel", layers="auto", kl_budget=(one + both) / 2, **CALIBRATION)
    assert few.plan.reblocked == (first,)
    with pytest.raises(UsageError, match="loses least"):
        convert(source, tmp_path / "no", block="parallel", layers="auto", kl_budget=one / 2, **CALIBRATION)
    assert not (tmp_path / "no").exists()


def test_auto_takes_as_many_layers_as_asked(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    best = {}
    for layers in ("auto:1", "auto:50%"):
        out = tmp_path / layers.strip("%")
        done = convert(source, out, block="parallel", layers=layers, **CALIBRATION)
        facts = json.loads((out / "rehead.json").read_text())["calibration"]["chosen_layers"]
        assert facts["asked"] == layers
        assert done.plan.reblocked == (facts["path"][0][0],)
        best[layers] = done.plan.reblocked
        assert facts["alone"][str(best[layers][0])] == min(facts["alone"].values())
    assert best["auto:1"] == best["auto:50%"]
    with pytest.raises(UsageError, match="choose from 1 to 2"):
        convert(source, tmp_path / "no", block="parallel", layers="auto:3", **CALIBRATION)
    for wrong in ("auto:", "auto:x", "auto:0%", "auto:101%", "auto:1.5"):
        with pytest.raises(UsageError, match=r"auto:6 or auto:50%|per cent"):
            convert(source, tmp_path / "no", block="parallel", layers=wrong, **CALIBRATION)
    assert not (tmp_path / "no").exists()


def test_auto_leaves_out_a_layer_that_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so in JSON that any parser reads."""

    from rehead.variants.ranking import LayerSwitch

    source = tiny.save_tiny("llama", tmp_path / "source")
    kl = LayerSwitch.kl
    monkeypatch.setattr(LayerSwitch, "kl", lambda self, layers: float("inf") if 1 in layers else kl(self, layers))
    done = convert(source, tmp_path / "out", block="parallel", layers="auto", kl_budget=100.0, **CALIBRATION)
    assert done.plan.reblocked == (0,)
    text = (tmp_path / "out" / "rehead.json").read_text()
    facts = json.loads(text, parse_constant=pytest.fail)["calibration"]["chosen_layers"]
    assert facts["alone"]["1"] is None
    assert facts["alone"]["0"] > 0
    with pytest.raises(UsageError, match="--layers auto:2: only 1 of 2 layers can be parallel and leave finite logits"):
        convert(source, tmp_path / "no", block="parallel", layers="auto:2", **CALIBRATION)


def test_a_switch_and_a_host_in_one_run(tmp_path: Path) -> None:
    """A serial GPT-NeoX becomes parallel, and with that a Phi."""
    source = tiny.tiny_model("gpt_neox-serial")
    source.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", block="parallel", host="auto")
    assert done.plan.config.model_type == "phi"
    wanted = parallel_by_definition(source, {0, 1})
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), wanted, atol=1e-5, rtol=1e-5)


def test_falcon_with_a_norm_or_two(tmp_path: Path) -> None:
    """The old parallel block becomes serial with its norm twice; the new decoder's two norms keep their places."""
    for name in ("falcon-mqa", "falcon-mha"):
        source = tiny.save_tiny(name, tmp_path / name)
        serial = convert(source, tmp_path / f"{name}-serial", block="serial")
        assert not serial.plan.config.parallel_attn
        model = loaded(tmp_path / f"{name}-serial")
        wanted = logits(loaded(source))
        torch.testing.assert_close(parallel_by_definition(model, {0, 1}), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedError, match="parallel blocks only"):
        plan(tiny.save_tiny("falcon", tmp_path / "falcon"), block="serial")


def test_the_modelling_file_needs_no_rehead(tmp_path: Path) -> None:
    """Whoever trusts the file beside the weights gets the same logits in a process that never imports rehead."""
    tiny.save_tiny("llama", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", block="parallel")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "trust = {'trust_remote_' + 'code': True}\n"
        "trust |= {'dtype': torch.float32, 'attn_implementation': 'eager'}\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)\n"
        "ids = torch.arange(24).view(2, 12) * 7 % 96\n"
        "assert not any(name.split('.')[0] == 'rehead' for name in sys.modules)\n"
        "torch.save(m.eval()(ids, use_cache=False).logits.detach(), sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "logits")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(theirs, logits(loaded(tmp_path / "out")), atol=1e-6, rtol=1e-6)


def test_layers_as_text() -> None:
    assert parse_layers(None, 3) == parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("0, 4-6,5", 8) == [0, 4, 5, 6]
    assert parse_layers((2, 1), 3) == [1, 2]
    for text, says in [
        ("3", "layer 3 does not exist; the model's layers are 0 to 2"),
        ("1-9", "layer 3 does not exist"),
        ("7", "layer 7 does not exist"),
        ("0,5-999999", "layer 5 does not exist"),
        ("2-1", "runs backwards"),
        ("one", "no layer"),
        ("-1", "no layer"),
        ("", "no layer"),
    ]:
        with pytest.raises(UsageError, match=says):
            parse_layers(text, 3)
    with pytest.raises(UsageError, match="layer -1"):
        parse_layers([-1], 3)


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("llama", {"block": "parallel", "plain": True}, UnsupportedError, "leave --plain out"),
        ("llama", {"block": "parallel", "layers": "0-2"}, UsageError, "layer 2 does not exist"),
        ("llama", {"block": "serial"}, UsageError, "serial already"),
        ("llama", {"block": "paralel"}, UsageError, "'parallel'"),
        ("llama", {"layers": "1", "num_key_value_heads": 2}, UsageError, "--block"),
        ("llama", {"block": "parallel", "layers": "auto"}, UsageError, "--kl-budget"),
        ("llama", {"block": "parallel", "kl_budget": 0.1}, UsageError, "--layers auto"),
        ("llama", {"block": "parallel", "layers": "auto", "kl_budget": 0.1}, UsageError, "runn"),
        ("llama", {"refit": True, "host": "auto"}, UsageError, "--refit"),
        ("phi", {"block": "serial"}, UnsupportedError, "parallel blocks only"),
        ("gpt2", {"block": "parallel"}, UnsupportedError, "serial blocks only"),
        ("gpt_neox", {"block": "serial", "layers": "0"}, UnsupportedError, "all layers together"),
        ("gpt_neox", {"block": "serial", "num_key_value_heads": 2, "refit": True}, UnsupportedError, "second run"),
        ("stablelm", {"block": "parallel", "refit": True}, UnsupportedError, "second run"),
        ("mixtral", {"block": "parallel", "refit": True}, UnsupportedError, "mixture of experts"),
    ],
)
def test_refusals_are_one_line(name: str, options: dict, error: type, says: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(name, tmp_path / "source")
    with pytest.raises(error, match=says) as caught:
        plan(source, **options)
    assert "\n" not in str(caught.value)
    assert "persimmon" not in str(caught.value), "which has a parallel class to load, but cannot be converted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_norm_that_deletes_a_channel_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("stablelm")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = 0.0
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError, match="layer 1 deletes channel 5"):
        convert(tmp_path / "source", tmp_path / "out", block="parallel")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_flags(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    flags = ["--block", "parallel", "--layers", "1", "--json"]
    done = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "out"), *flags])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["block"]["layers"] == [1]
    assert facts["num_key_value_heads"] == {"before": 4, "after": 4}
    shown = CliRunner().invoke(convert_command, [str(source), str(tmp_path / "two"), *flags[:-1]])
    assert "parallel in 1 of 2 layers" in shown.output
