"""The folder that transformers loads is the folder that Rehead converts: what a class ignores is no part of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rehead.checkpoints.opening import open_source
from rehead.cli import cli
from rehead.convert import convert, inspect, plan, verify
from rehead.errors import UnsupportedError
from rehead.models.config import causal_lm_class, resolve_config
from rehead.models.families import FAMILIES
from rehead.models.model import open_model

MHA = {"num_key_value_heads": tiny.HEADS}
#: How checkpoints spell the layers of some classes, by the start that theirs replaces.
SPELLINGS = {"qwen3_5_text": ("model.", "model.language_model."), "nemotron_h": ("model.", "backbone.")}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def ghosts_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bias beside every matrix that has none, a draft copy of everything, and old buffers."""
    extra = {f"mtp.{name}": tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        if stem != name and tensor.ndim == 2 and f"{stem}bias" not in tensors:
            extra[f"{stem}bias"] = torch.randn(max(tensor.shape))
    return extra | {"rotary_emb.inv_freq": torch.ones(4), "old": torch.ones(2)}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_class_ignores_changes_no_layout(name: str, tmp_path: Path) -> None:
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source = tiny.save_tiny(name, tmp_path)
    tensors = load_file(source / "model.safetensors")
    if name in SPELLINGS:
        tensors = {key.replace(*SPELLINGS[name], 1): tensor for key, tensor in tensors.items()}
        save(source, tensors)
    clean = open_model(source)
    extra = ghosts_of(tensors)
    save(source, tensors | extra)
    opened = open_model(source)
    assert opened.source.ignored.keys() == extra.keys()
    assert opened.source.tensors.keys() == clean.source.tensors.keys()
    assert opened.family.layer == clean.family.layer
    assert [opened.layer_tensors(i) for i in opened.layers] == [clean.layer_tensors(i) for i in clean.layers]


@pytest.mark.parametrize(
    ("name", "switch", "overrides"),
    [("gpt_neox", {"attention_bias": False}, {}), ("opt", {"enable_bias": False}, {}),
     ("llama", {"attention_bias": False, "mlp_bias": False}, MHA | {"attention_bias": True, "mlp_bias": True})],
)  # fmt: skip
def test_biases_that_a_switch_turns_off_do_not_come_back(
    name: str, switch: dict[str, Any], overrides: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny.save_tiny(name, tmp_path / "source", **overrides)
    edit(source, **switch)
    if name != "llama":
        done = convert(source, tmp_path / "out", host="auto")
        assert done.plan.exact
        before, after = (tiny.logits(AutoModelForCausalLM.from_pretrained(f)) for f in (source, tmp_path / "out"))
        assert float((before - after).abs().max()) < 1e-4
    else:
        assert inspect(source)["biases"] == []
        assert not any(
            "bias" in change.name for change in plan(source, num_key_value_heads=2, method="procrustes").changes
        )
        convert(source, tmp_path / "out", block="parallel", refit=True, calibration=["random"],
                calibration_tokens=256, calibration_length=32)  # fmt: skip
        assert "mlp.down_proj.bias" not in json.dumps(
            [c.name for c in plan(source, block="parallel", refit=True).changes]
        )


def test_draft_layers_are_named(tmp_path: Path) -> None:
    source = tiny.save_tiny("qwen3_next", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    draft = {k.replace("model.layers.1.", "mtp.layers.0."): v for k, v in tensors.items() if "layers.1." in k}
    save(source, tensors | draft)
    done = convert(source, tmp_path / "out", num_key_value_heads=1)
    assert done.as_json()["drafts"] == inspect(source)["drafts"] == ["mtp.layers.0"]
    assert "mtp.layers.0" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").drafts == ("mtp.layers.0",)
    for line in (["inspect", str(source)], ["plan", str(source), "--kv-heads", "1"], ["verify", str(tmp_path / "out")]):
        assert "mtp.layers.0 drafts tokens" in CliRunner().invoke(cli, line).output


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe"])
def test_draft_layers_are_left_out_on_request(name: str, tmp_path: Path) -> None:
    """A tree of their own with what stands beside its layers, or one layer more than the model has."""
    source = tiny.save_tiny(name, tmp_path / "source")
    edit(source, num_nextn_predict_layers=1)
    tensors = load_file(source / "model.safetensors")
    start = "mtp.layers.0." if name == "qwen3_next" else "model.layers.2."
    draft = {k.replace("model.layers.1.", start): v for k, v in tensors.items() if "layers.1." in k}
    beside = (
        {"mtp.fc.weight": torch.zeros(2, 2)} if name == "qwen3_next" else {f"{start}eh_proj.weight": torch.zeros(2)}
    )
    save(source, tensors | draft | beside)
    done = convert(source, tmp_path / "out", num_key_value_heads=1, drop_drafts=True)
    assert done.as_json()["dropped"] == sorted({**draft, **beside}, key=done.as_json()["dropped"].index)
    assert set(done.as_json()["dropped"]) == draft.keys() | beside.keys()
    assert done.as_json()["drafts"] == []
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not written.keys() & (draft.keys() | beside.keys())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "were left out" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", str(source)).drafts == ()


def test_the_config_class_is_the_one_that_auto_config_takes(tmp_path: Path) -> None:
    for name in sorted(FAMILIES):
        if tiny.available(name):
            raw = tiny.tiny_config(name).to_dict() | {"layer_types": None}
            raw = raw if name == "mistral" else tiny.tiny_config(name).to_dict()
            (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
            try:
                auto = AutoConfig.from_pretrained(tmp_path)
            except ValueError:  # before 5.23 this class does not read what it writes
                assert name == "dbrx"
                continue
            assert type(resolve_config(raw, name)) is type(auto), name
            assert causal_lm_class(auto).__name__ == type(AutoModelForCausalLM.from_config(auto)).__name__


def test_ministral_under_mistrals_name_keeps_its_windows(tmp_path: Path) -> None:
    source = tiny.save_tiny("ministral", tmp_path / "source")
    edit(source, model_type="mistral", architectures=["MistralForCausalLM"])
    done = convert(source, tmp_path / "out", num_key_value_heads=1)
    assert done.plan.config.model_type == "ministral"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "MinistralForCausalLM"


def test_a_machines_preference_is_no_part_of_a_model(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    edit(source, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_3")
    convert(source, tmp_path / "out", num_key_value_heads=2)
    assert "implementation" not in (tmp_path / "out" / "config.json").read_text()
    verify(tmp_path / "out", str(source))


def test_a_link_to_a_snapshot_is_taken_as_its_target_is(tmp_path: Path) -> None:
    source, blobs = tiny.save_tiny("llama", tmp_path / "hub" / "snapshots" / "abc"), tmp_path / "hub" / "blobs"
    blobs.mkdir()
    for file in list(source.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    (tmp_path / "link").symlink_to(source)
    convert(tmp_path / "link", tmp_path / "out", num_key_value_heads=2)
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_code_of_a_tokenizer_that_stays_behind_is_named(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    (source / "wrap.py").write_text("raise SystemExit(1)\n")
    done = convert(source, tmp_path / "out", num_key_value_heads=2)
    assert done.as_json()["code_left_out"] == ["wrap.py"]
    assert not (tmp_path / "out" / "wrap.py").exists()
    assert "`wrap.py`" in (tmp_path / "out" / "README.md").read_text()


def test_a_hybrid_without_attention_is_refused_in_a_line(tmp_path: Path) -> None:
    source = tiny.save_tiny("qwen3_next", tmp_path)
    edit(source, layer_types=["linear_attention"] * tiny.LAYERS)
    with pytest.raises(UnsupportedError, match="none of its layers has softmax attention"):
        open_model(source)


@pytest.mark.parametrize("value", [float("inf"), "x", ["x"], 7, {"AutoConfig": "modeling_rehead_x/../y.Z"}, {"a": [1]}])
def test_an_auto_map_that_is_none_is_dropped(value: Any, tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    edit(source, auto_map=value)
    convert(source, tmp_path / "out", num_key_value_heads=2)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


BASE: dict[str, Path] = {}


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    name=st.sampled_from(["llama", "qwen2", "opt", "gpt_neox", "mixtral", "gemma2"]),
    adapter=st.booleans(), ghosts=st.booleans(), bare=st.booleans(), tied=st.booleans(), head=st.booleans(),
    index=st.booleans(), stray=st.booleans(),
)  # fmt: skip
def test_the_folder_that_transformers_loads_is_the_one_that_is_converted(
    tmp_path_factory: pytest.TempPathFactory, name: str, adapter: bool, ghosts: bool, bare: bool, tied: bool,
    head: bool, index: bool, stray: bool,
) -> None:  # fmt: skip
    """Adapters beside, draft layers, a base model's names, tied heads stored or not, an index with strays in a shard:
    the result computes what transformers makes of the folder, or Rehead refuses it."""
    if name not in BASE:
        BASE[name] = tiny.save_tiny(name, tmp_path_factory.mktemp(name), tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("mix")
    shutil.copytree(BASE[name], folder, dirs_exist_ok=True)
    edit(folder, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    heads = [key for key in tensors if key in ("lm_head.weight", "embed_out.weight")]
    if bare:
        prefix = f"{causal_lm_class(AutoConfig.from_pretrained(folder)).base_model_prefix}."
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    if not head:
        tensors = {key: tensor for key, tensor in tensors.items() if key not in heads}
    if ghosts:
        tensors |= ghosts_of(tensors)
    save(folder, tensors)
    if index:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        listed = dict.fromkeys(list(tensors)[: -1 if stray else None], "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    if adapter:
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(UnsupportedError, match="adapter"):
            open_source(folder)
        return
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        return  # transformers draws a head that is nowhere at random
    out = tmp_path_factory.mktemp("out") / "out"
    kv = open_model(folder).num_kv_heads
    convert(folder, out, num_key_value_heads=kv, host="auto" if FAMILIES[name].hosted else None)
    after = tiny.logits(AutoModelForCausalLM.from_pretrained(out))
    assert float((tiny.logits(model.eval()) - after).abs().max()) < 1e-4
