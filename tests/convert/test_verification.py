"""Checkpoints as people have them: what is not the usual comes out plain, is told apart, or is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rehead.checkpoints.source import LocalSource
from rehead.cli import cli
from rehead.convert import convert, plan, verification, verify
from rehead.convert.commands import verify_command
from rehead.errors import UnsupportedError, VerificationError
from rehead.models import streamed
from rehead.models.modeling.modeling_rehead_cache import passed_cache
from rehead.models.rewritten_source import cast


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save_tiny("llama", tmp_path / "llama")


def test_somebodys_auto_map_is_left_behind(llama: Path, tmp_path: Path) -> None:
    """Falcon's, Phi-3's and others' configs name remote code though transformers has the class: the result is plain."""
    path = llama / "config.json"
    names = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.Y"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names}))
    (llama / "modeling_x.py").write_text("raise SystemExit")
    done = convert(llama, tmp_path / "out", num_key_value_heads=1)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert done.plan.as_json()["config_changes"]["auto_map"] == {"before": names, "after": None}
    assert not list((tmp_path / "out").glob("*.py"))
    assert verify(tmp_path / "out", str(llama)).plain
    assert "modelling file" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kept", [0, 192 << 20])
def test_it_shows_how_many_layers_have_run(llama: Path, tmp_path: Path, monkeypatch, kept: int) -> None:
    """Two layers: a full pass, a prefill and two tokens, or more where the model stays in memory, and the source's."""
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    convert(llama, tmp_path / "out", num_key_value_heads=1)
    told: list[tuple[str, float, float]] = []
    verify(tmp_path / "out", str(llama), progress=lambda *step: told.append(step))
    assert [stage for stage, _, _ in told] == sorted(stage for stage, _, _ in told)
    ran = [step[1:] for step in told if step[0] == "running"]
    assert [done for done, _ in ran] == [*range(1, len(ran) + 1)]
    assert all(done <= total for done, total in ran)
    assert ran[-1] == ((10, 10) if kept == 0 else (22, 22))


def test_a_base_model_is_compared_through_the_same_head(llama: Path, tmp_path: Path) -> None:
    """A checkpoint without a head gets a random one from transformers: both models must get the same."""
    AutoModelForCausalLM.from_pretrained(llama).base_model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "same", num_key_value_heads=tiny.KV_HEADS)
    convert(tmp_path / "base", tmp_path / "one", num_key_value_heads=1)
    state = torch.get_rng_state()
    found = verify(tmp_path / "same", str(tmp_path / "base")).against_source
    assert torch.equal(torch.get_rng_state(), state)
    assert found is not None
    assert found["max_difference"] == 0
    pooled = verify(tmp_path / "one", str(tmp_path / "base")).against_source
    assert pooled is not None
    assert pooled["max_difference"] > 0
    with pytest.raises(VerificationError, match=r"missing.*give --source MODEL"):
        verify(tmp_path / "same")


def test_what_the_source_lacks_is_said(llama: Path, tmp_path: Path) -> None:
    """Nothing is silent: a base model's head is drawn anew by each load, before the conversion and after it."""
    AutoModelForCausalLM.from_pretrained(llama).base_model.save_pretrained(tmp_path / "base")
    done = convert(tmp_path / "base", tmp_path / "out", num_key_value_heads=1)
    assert (done.as_json()["missing"], done.as_json()["unexpected"]) == (["lm_head.weight"], [])
    assert verify(tmp_path / "out", str(tmp_path / "base")).missing == ("lm_head.weight",)
    said = "lm_head.weight is missing as in the source"
    for line in (["plan", str(tmp_path / "base"), "--kv-heads", "1"],
                 ["verify", str(tmp_path / "out"), "--source", str(tmp_path / "base")]):  # fmt: skip
        result = CliRunner().invoke(cli, line)
        assert result.exit_code == 0
        assert said in result.output
        assert "no missing" not in result.output
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"model.old": torch.zeros(2)}, llama / "model.safetensors", {"format": "pt"})
    done = convert(llama, tmp_path / "more", num_key_value_heads=1)
    assert (done.as_json()["missing"], done.as_json()["unexpected"]) == ([], ["model.old"])
    assert verify(tmp_path / "more", str(llama)).unexpected == ("model.old",)


@pytest.mark.parametrize("broken", ["missing", "renamed", "misshapen"])
def test_a_checkpoint_that_is_not_whole_is_refused(llama: Path, tmp_path: Path, broken: str) -> None:
    """transformers would draw what a body lacks at random, and not load what has another shape."""
    tensors, name = load_file(llama / "model.safetensors"), "model.layers.1.input_layernorm.weight"
    tensor = tensors.pop(name)
    if broken == "renamed":
        tensors[name.replace("weight", "gamma")] = tensor
    if broken == "misshapen":
        tensors[name] = tensor[:-2].clone()
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    said = "of another shape" if broken == "misshapen" else "missing"
    with pytest.raises(UnsupportedError, match=rf"not whole.*{said} \({name}\).*fetch it again"):
        plan(llama, num_key_value_heads=1)


def test_classes_with_caches_of_their_own_verify(tmp_path: Path) -> None:
    """Bamba counts positions from 0 unless told; RecurrentGemma hands back no cache; MiniMax's is off, converted or
    not, which only its source can tell."""
    found = {}
    for name in ("bamba", "recurrent_gemma", "minimax"):
        source = tiny.save_tiny(name, tmp_path / name)
        convert(source, tmp_path / f"{name}-1", num_key_value_heads=1)
        found[name] = verify(tmp_path / f"{name}-1", str(source))
    assert found["bamba"].cache_error is not None
    assert found["bamba"].cache_error < 1e-5
    assert found["recurrent_gemma"].cache_error is None
    assert found["bamba"].source_cache_error is found["recurrent_gemma"].source_cache_error is None
    assert found["minimax"].source_cache_error is not None
    assert found["minimax"].source_cache_error > 2e-3
    with pytest.raises(VerificationError, match=r"with a KV cache differ .* give --source MODEL"):
        verify(tmp_path / "minimax-1")
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "recurrent_gemma-1")])
    assert "nothing was compared" in result.output
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "minimax-1"), "--source", str(tmp_path / "minimax")])
    assert "the class itself computes something else with a cache" in result.output


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj"])
def test_numbers_beyond_the_dtype_are_refused(llama: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"][0] = 1e6
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=rf"layers.1.{name}.weight: holds .*e\+0.*beyond float16's 6.55e\+04"):
        convert(llama, tmp_path / "out", num_key_value_heads=tiny.KV_HEADS // 2, method="first", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(llama, tmp_path / "out", num_key_value_heads=1, dtype="bfloat16")


def test_what_is_no_number_does_not_verify(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons with a NaN are false, so that neither a cache nor a source that gives one may look close enough."""
    from rehead.convert import verification

    convert(llama, tmp_path / "out", num_key_value_heads=tiny.KV_HEADS)
    assert verify(tmp_path / "out", str(llama)).cache_error < 1e-5
    run = verification._run

    def broken(model, tokens, source, **options):
        step = run(model, tokens, source, **options)
        if passed_cache(options) is not None:
            step.logits[..., 0] = torch.nan
        return step

    with monkeypatch.context() as patched:
        patched.setattr(verification, "_run", broken)
        with pytest.raises(VerificationError, match="with a KV cache differ from those without by nan"):
            verify(tmp_path / "out")
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="llama: its logits are not finite, so nothing can be compared"):
        verify(tmp_path / "out", str(llama))


@pytest.mark.parametrize("at", [0, 7])
def test_a_cache_that_is_off_fails(llama: Path, tmp_path: Path, monkeypatch, at: int) -> None:
    """Eight tokens are decoded after a prefill of half of them, and each of them counts."""
    convert(llama, tmp_path / "out", num_key_value_heads=1)
    real, steps = verification._run, []

    def broken(model, tokens, source, **options):
        output = real(model, tokens, source, **options)
        if tokens.shape[1] == 1:
            steps.append(tokens)
            output.logits = output.logits * (1.01 if len(steps) == at + 1 else 1.0)
        return output

    monkeypatch.setattr(verification, "_run", broken)
    with pytest.raises(VerificationError, match="KV cache differ"):
        verify(tmp_path / "out")
    assert len(steps) == 8
    steps.clear()
    with pytest.raises(VerificationError, match=r"KV cache differ .* its source's by .*; report this model"):
        verify(tmp_path / "out", str(llama))
    assert len(steps) == 16


def test_a_weight_that_came_out_not_finite_is_told_from_one_too_large() -> None:
    for number in (float("nan"), float("inf")):
        with pytest.raises(UnsupportedError, match="w: came out not finite"):
            cast("w", torch.tensor([1.0, number]), torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"w: holds 7e\+04, beyond float16's 6.55e\+04"):
        cast("w", torch.tensor([1.0, -7e4]), torch.float16)
    assert cast("w", torch.tensor([1.0]), torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("method", "read"), [("mean", "kv"), ("first", "kv"), ("procrustes", "qkvo")])
def test_what_a_method_leaves_alone_is_not_read(llama: Path, tmp_path: Path, monkeypatch, method, read) -> None:
    seen, real = set(), LocalSource.read
    monkeypatch.setattr(LocalSource, "read", lambda source, name: (seen.add(name), real(source, name))[1])
    convert(llama, tmp_path / "out", num_key_value_heads=1, method=method)
    assert {name.split(".")[-2][0] for name in seen if "_proj" in name and "mlp" not in name} == set(read)
    assert not any("mlp" in name for name in seen)


def test_a_carried_file_needs_what_it_imports_and_no_more(llama: Path, tmp_path: Path) -> None:
    """A checkpoint of an earlier version carries a single file, which imports nothing beside it."""
    convert(llama, tmp_path / "out", block="parallel")
    core, file = (tmp_path / "out" / f"modeling_rehead_{name}.py" for name in ("core", "parallel"))
    core.unlink()
    forget(tmp_path / "out", core.name)
    with pytest.raises(VerificationError, match=r"modeling_rehead_core\.py, which is not there"):
        verify(tmp_path / "out")
    file.write_text(file.read_text().replace("from .modeling_rehead_core import", "# from"))
    forget(tmp_path / "out", file.name, hash_again=True)
    verify(tmp_path / "out")


def forget(folder: Path, name: str, hash_again: bool = False) -> None:
    """Take a file out of the manifest, or put what it has become there."""
    path = folder / "rehead.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    if hash_again:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def test_the_cache_is_as_large_as_the_layout_says(tmp_path: Path) -> None:
    """Windows of 8 tokens are full; Falcon's class caches more than it has to, which is told and no error."""
    for name in ("gemma3_text", "bamba", "falcon"):
        source = tiny.save_tiny(name, tmp_path / name)
        convert(source, tmp_path / f"{name}-out", num_key_value_heads=1)
        size = verify(tmp_path / f"{name}-out").cache_bytes
        assert size["tokens"] > 8
        assert size["measured"] == size["layout"] * (tiny.HEADS if name == "falcon" else 1)
    said = CliRunner().invoke(verify_command, [str(tmp_path / "gemma3_text-out")]).output
    assert "as its layout says" in said
