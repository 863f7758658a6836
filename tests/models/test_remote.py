"""Layouts that came with remote code: as a class of transformers they compute what the description says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_published import PUBLISHED, reference, write
from remote_reference import VOCAB
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM

from rehead.cli import main
from rehead.convert import convert, inspect, plan, verify
from rehead.convert.whole_model import load_whole
from rehead.errors import UnsupportedError, UsageError
from rehead.models.families.remote import REMOTE
from rehead.models.model import open_model
from rehead.recipes.evaluation.models import load_model
from rehead.recipes.training.models import load, open_checkpoint

TOKENS = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(1))


def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS[None]).logits[0].double()


def test_every_layout_has_a_checkpoint_and_a_reference() -> None:
    assert {published.config["model_type"] for published in PUBLISHED.values()} == set(REMOTE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_stock_class_computes_what_the_description_says(name: str, tmp_path: Path) -> None:
    config, tensors = write(tmp_path / "in", name)
    done = convert(tmp_path / "in", tmp_path / "out", host="auto")
    expected = reference(name, config, tensors, TOKENS)
    assert (logits(tmp_path / "out") - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == PUBLISHED[name].host
    assert done.as_json()["layout"]["after"] == PUBLISHED[name].host
    assert done.plan.exact
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = verify(tmp_path / "out", source=str(tmp_path / "in")).as_json()
    assert report["against_source"]["max_difference"] == 0.0


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "falcon-7b"])
def test_it_is_converted_like_any_other_model(name: str, tmp_path: Path) -> None:
    """In one step from the published layout, and from its plain form: the same bytes."""
    write(tmp_path / "in", name)
    options: dict[str, Any] = {"num_key_value_heads": 1, "method": "procrustes"}
    convert(tmp_path / "in", tmp_path / "direct", **options)
    convert(tmp_path / "in", tmp_path / "plain", host="auto")
    convert(tmp_path / "plain", tmp_path / "second", **options)
    direct, second = (load_file(tmp_path / way / "model.safetensors") for way in ("direct", "second"))
    assert direct.keys() == second.keys()
    assert all(torch.equal(direct[key], second[key]) for key in direct)
    assert plan(tmp_path / "in", num_key_value_heads=1).kv == 1
    assert torch.isfinite(logits(tmp_path / "direct")).all()


def test_it_is_evaluated_and_trained_as_it_is(tmp_path: Path) -> None:
    """Without a plain copy on disk: the weights are read in the host's layout."""
    config, tensors = write(tmp_path / "in", "chatglm2")
    expected = reference("chatglm2", config, tensors, TOKENS)
    judged = load_model("model", str(tmp_path / "in"), device=torch.device("cpu"))
    trained = load(open_checkpoint(str(tmp_path / "in")), torch.float32, torch.device("cpu"))
    for model in (judged.model, trained.eval()):
        with torch.no_grad():
            found = model(input_ids=TOKENS[None]).logits[0].double()
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_measured_whole_has_the_published_weights(name: str, tmp_path: Path) -> None:
    """Layers are chosen and budgets met on this model, not on one of random weights."""
    config, tensors = write(tmp_path / "in", name)
    expected = reference(name, config, tensors, TOKENS)
    whole = load_whole(open_model(tmp_path / "in"), torch.device("cpu"), "measure it")
    with torch.no_grad():
        result = whole(input_ids=TOKENS[None]).logits[0].double()
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_inspect_tells_which_class_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", "chatglm2")
    facts = inspect(tmp_path / "in")
    assert facts["layout"] == {"before": "chatglm", "after": "glm"}
    assert (facts["num_attention_heads"], facts["num_key_value_heads"], facts["model_type"]) == (4, 2, "glm")
    told = {
        "inspect": "chatglm with remote code, which is not needed",
        "plan": "chatglm -> glm, which computes the same",
    }
    for command, words in told.items():
        with pytest.raises(SystemExit) as ended:
            main([command, str(tmp_path / "in"), *(["--kv-heads", "1"] if command == "plan" else [])])
        assert ended.value.code in (0, None)
        assert words in " ".join(capsys.readouterr().out.split())


def test_shards_stay_shards_and_a_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused tensor becomes three in its own shard."""
    _, tensors = write(tmp_path / "in", "internlm2")
    convert(tmp_path / "in", tmp_path / "whole", num_key_value_heads=1)
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / "in" / file, {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "in" / "model.safetensors").unlink()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with monkeypatch.context() as patched:
        patched.setattr("rehead.checkpoints.target.Target.commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "in", tmp_path / "out", num_key_value_heads=1)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "in", tmp_path / "out", num_key_value_heads=1, resume=True)
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(parts)
    found = {key: value for file in parts for key, value in load_file(tmp_path / "out" / file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_what_differs_beyond_the_training_length_is_said(tmp_path: Path) -> None:
    write(tmp_path / "in", "qwen")
    convert(tmp_path / "in", tmp_path / "out", host="auto")
    said = "eyond 64 positions the remote code rescales (use_dynamic_ntk, use_logn_attn)"
    assert said in (tmp_path / "out" / "README.md").read_text().replace("\\_", "_")
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 64


REFUSED = [
    ("chatglm2", {"position_encoding_2d": True}, "two dimensions"),
    ("chatglm2", {"inner_hidden_size": 64}, "two dimensions"),
    ("chatglm2", {"apply_residual_connection_post_layernorm": True}, "behind the norms"),
    ("chatglm2", {"rmsnorm": False}, "LayerNorms"),
    ("chatglm2", {"add_bias_linear": True}, "has a bias"),
    ("chatglm2", {"original_rope": False}, "rotary pairs"),
    ("chatglm2", {"pre_seq_len": 16}, "trained prefix"),
    ("chatglm2", {"quantization_bit": 4}, "quantised"),
    ("chatglm2", {"vision_config": {}}, "images"),
    ("glm4", {"_name_or_path": "THUDM/chatglm2-6b-32k"}, "divides positions"),
    ("chatglm2", {"multi_query_group_num": None}, "shapes that config.json claims"),
    ("qwen", {"no_bias": False}, "has a bias"),
    ("qwen", {"rotary_pct": 0.5}, "a part of each head"),
    ("qwen", {"kv_channels": 16}, "hidden size"),
    ("internlm2", {"rope_scaling": {"type": "odd"}}, "'odd'"),
    ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "behind the norms"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_no_class_computes_is_refused(name: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write(tmp_path / "in", name)
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UnsupportedError, match=reason) as refused:
        inspect(tmp_path / "in")
    assert "\n" not in str(refused.value)


def test_alibi_is_refused_by_name(tmp_path: Path) -> None:
    config, _ = write(tmp_path / "in", "baichuan2")
    del config["max_position_embeddings"]
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "model_max_length": 4096}))
    with pytest.raises(UnsupportedError, match=r"ALiBi.*give Baichuan-7B"):
        plan(tmp_path / "in", num_key_value_heads=1)


def test_a_missing_key_and_an_unknown_tensor_are_named(tmp_path: Path) -> None:
    config, tensors = write(tmp_path / "in", "chatglm2")
    extra = {"transformer.prefix_encoder.embedding.weight": torch.ones(2, 2)}
    save_file({**tensors, **extra}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"prefix_encoder\.embedding\.weight has no place"):
        inspect(tmp_path / "in")
    del config["ffn_hidden_size"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="no ffn_hidden_size"):
        inspect(tmp_path / "in")


def test_a_tokenizer_with_code_is_named_and_a_plain_one_beside_it_read(tmp_path: Path) -> None:
    write(tmp_path / "in", "chatglm2", padded_vocab_size=VOCAB)
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"a sentencepiece model")
    named = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(named))
    options: dict[str, Any] = {"num_key_value_heads": 1, "method": "svd", "calibration_tokens": 512}
    with pytest.raises(UsageError, match=r"needs remote code .*tokenization_x\.XTokenizer.*tokenizer\.json"):
        convert(tmp_path / "in", tmp_path / "out", **options)
    words = {chr(97 + i): i for i in range(26)} | {"?": 26}
    plain = Tokenizer(WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = Whitespace()
    plain.save(str(tmp_path / "in" / "tokenizer.json"))
    done = convert(tmp_path / "in", tmp_path / "out", **options)
    assert set(done.layers) == {0, 1}
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_remote_code_is_neither_run_nor_copied(tmp_path: Path) -> None:
    write(tmp_path / "in", "chatglm2")
    (tmp_path / "in" / "modeling_x.py").write_text("raise SystemExit('run')")
    convert(tmp_path / "in", tmp_path / "out", num_key_value_heads=1)
    assert not list((tmp_path / "out").glob("*.py"))
