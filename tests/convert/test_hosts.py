"""Models under another class: the same logits before anything is pooled, or a refusal that names the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import IDS, loaded, logits
from transformers import AutoModelForCausalLM

from rehead.checkpoints.safetensors_io import read_header
from rehead.convert import convert, inspect, plan, verify
from rehead.convert.hosts.registry import _PAIRS
from rehead.errors import UnsupportedError, UsageError
from rehead.models.families.rope import rope_fields

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

# (tiny model, its config's changes, host, whether weights are folded)
PAIRS = [
    ("gpt_neox", {}, "phi", True),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}, "phi", True),
    ("gpt_neox", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, "phi", True),
    ("gpt_neox-full", {}, "starcoder2", False),
    ("gpt_neox-full", {"attention_bias": True, "tie_word_embeddings": True}, "starcoder2", False),
    ("gpt_neox-serial", {"layer_norm_eps": 1e-3}, "nemotron", True),
    ("gptj", {}, "phi", False),
    ("gptj", {"tie_word_embeddings": True}, "phi", False),
    ("codegen", {"n_inner": None, "activation_function": "relu"}, "phi", False),
    ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-3}, "gpt_bigcode", False),
    ("gpt2", {"n_inner": None, "tie_word_embeddings": False, "scale_attn_weights": False}, "gpt_bigcode", False),
    ("gpt_neo", {"intermediate_size": None}, "gpt_bigcode", True),
    ("opt", {"enable_bias": False}, "gpt_bigcode", False),
    ("opt", {"tie_word_embeddings": False}, "gpt_bigcode", False),
    ("biogpt", {}, "gpt_bigcode", True),
    ("biogpt", {"scale_embedding": False}, "gpt_bigcode", False),
    ("xglm", {}, "gpt_bigcode", True),
    ("xglm", {"pad_token_id": 5, "scale_embedding": False}, "gpt_bigcode", True),
]


def test_every_pair_is_tried() -> None:
    assert {(tiny.model_type_of(name), host) for name, _, host, _ in PAIRS} == set(_PAIRS)


def test_a_share_of_the_head_is_the_same_number_of_dimensions_again() -> None:
    """Classes take the integer part of the product, and the quotient may have been rounded down."""
    rounded = 0
    for size in range(2, 257):
        for dims in range(2, size + 1, 2):
            fields = rope_fields({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, dims, size)
            factor = fields["partial_rotary_factor"]
            assert int(size * factor) == int(factor * size) == dims
            assert factor == pytest.approx(dims / size)
            assert 0 < factor <= 1
            rounded += factor != dims / size
    assert rounded > 0
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 5e5
    assert fields["rope_parameters"] == {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    assert rope_fields({"rope_theta": 1e4}, 4, 8)["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(("name", "changes", "host", "folded"), PAIRS)
def test_the_host_computes_the_same(name: str, changes: dict, host: str, folded: bool, tmp_path: Path) -> None:
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source = tiny.tiny_model(name, **changes)
    source.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "out", host=host)
    assert any(rewrite.rounds for rewrite in done.plan.rewrites) is folded
    facts = done.plan.as_json()
    assert facts["exact"]
    assert {"before": tiny.model_type_of(name), "after": host}.items() <= facts["host"].items()
    hosted = loaded(tmp_path / "out")
    assert hosted.config.model_type == host
    torch.testing.assert_close(logits(hosted), logits(source), atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # positions count from the first real token where the class counts them so
    ours, theirs = (
        model.generate(IDS, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        for model in (hosted, source)
    )
    assert torch.equal(ours, theirs)
    found = verify(tmp_path / "out", str(tmp_path / "source"))
    assert found.against_source["max_difference"] < 1e-5 * float(logits(source).abs().max()) + 1e-6


@pytest.mark.parametrize(("name", "host"), [("gpt_neox", "phi"), ("gpt_neox-full", "starcoder2"), ("gptj", "phi")])
def test_auto_finds_it_and_pools(name: str, host: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(name, tmp_path / "source")
    assert plan(source, host="auto").config.model_type == host
    done = convert(
        source, tmp_path / "out", num_key_value_heads=2, method="svd", refit=True, grouping="similar",
        calibration=["random"], calibration_tokens=2048, calibration_length=32,
    )  # fmt: skip
    assert done.plan.config.model_type == host
    before, after = done.layers[0]["logit_error"]
    assert after <= before
    assert loaded(tmp_path / "out").config.num_key_value_heads == 2
    assert verify(tmp_path / "out", str(source)).cache_error < 1e-4
    manifest = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert manifest["host"]["after"] == host
    assert not manifest["exact"]


def test_sixteen_bits_are_said_to_round(tmp_path: Path) -> None:
    tiny.tiny_model("gpt_neox").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    facts = convert(tmp_path / "source", tmp_path / "out", host="phi").plan.as_json()
    assert facts["exact"]
    assert facts["rounded"]
    assert verify(tmp_path / "out", str(tmp_path / "source")).against_source["mean_kl"] < 1e-3
    assert not plan(tiny.save_tiny("gptj", tmp_path / "j"), host="phi").rounded


def test_copied_tensors_are_streamed_as_bytes(tmp_path: Path) -> None:
    source = tiny.save_tiny("gptj", tmp_path / "source")
    made = plan(source, host="phi")
    copied = {tensor.name for tensor in made.outputs if tensor.origin is not None}
    assert "model.layers.1.mlp.fc1.weight" in copied
    assert "model.layers.1.self_attn.q_proj.weight" not in copied


def test_old_names_and_buffers(tmp_path: Path) -> None:
    """The first GPT-2 and GPT-NeoX checkpoints have other prefixes and carry their causal masks."""
    for name, root in (("gpt2", "transformer."), ("gpt_neox", "gpt_neox.")):
        model, folder = tiny.tiny_model(name), tmp_path / name
        model.save_pretrained(folder)
        tensors = {key.removeprefix(root): t for key, t in load_file(folder / "model.safetensors").items()}
        if name == "gpt_neox":
            tensors = {"embed_out.weight" if "lm_head" in key else root + key: t for key, t in tensors.items()}
            tensors = {key.replace(root + "embed_out", "embed_out"): t for key, t in tensors.items()}
        stem = "h.{}.attn." if name == "gpt2" else root + "layers.{}.attention."
        for layer in range(tiny.LAYERS):
            tensors[stem.format(layer) + "bias"] = torch.ones(1, 1, 128, 128).tril()
            tensors[stem.format(layer) + "masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        convert(folder, tmp_path / f"{name}-out", host="auto")
        assert not any("masked" in t.name for t in read_header(tmp_path / f"{name}-out" / "model.safetensors").tensors)
        torch.testing.assert_close(logits(loaded(tmp_path / f"{name}-out")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "options", "says"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"host": "auto"}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, {"host": "auto"}, "reorder_and_upcast_attn"),
        ("gpt2", {"add_cross_attention": True}, {"host": "auto"}, "add_cross_attention"),
        ("gpt2", {}, {"num_key_value_heads": 2}, "--kv-heads 1"),
        ("gpt_neo", {"attention_layers": ["global", "local"]}, {"host": "auto"}, "attend to 256 positions"),
        ("opt", {"do_layer_norm_before": False}, {"num_key_value_heads": 1}, "norms behind"),
        ("opt", {"word_embed_proj_dim": 32}, {"host": "auto"}, "projects its embeddings"),
        ("gpt_neox", {}, {"host": "starcoder2"}, "parallel"),
        ("gpt_neox-serial", {}, {"host": "phi"}, "serial"),
        ("gpt_neox-serial", {}, {"host": "starcoder2"}, "RoPE turns"),
        ("gpt_neox", {}, {"host": "gpt_bigcode"}, "cannot stand in"),
        ("llama", {}, {"host": "auto"}, "leave --host out"),
        ("gptj", {"activation_function": "gelu_new"}, {"host": "phy"}, "'phi'"),
        ("gptj", {"rotary_dim": 64}, {"host": "phi"}, "64 dimensions of heads of 8"),
        ("gptj", {}, {}, "nothing to do"),
    ],
)
def test_refuses_what_would_not_be_exact(name: str, changes: dict, options: dict, says: str, tmp_path: Path) -> None:
    tiny.tiny_model(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((UnsupportedError, UsageError), match=says) as error:
        plan(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_tensor_without_a_place_and_types_without_a_host(tmp_path: Path) -> None:
    source = tiny.save_tiny("gpt2", tmp_path / "gpt2")
    tensors = load_file(source / "model.safetensors") | {"score.weight": torch.zeros(2, 64)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    planned = plan(source, host="auto")
    assert planned.as_json()["unexpected"] == ["score.weight"]
    assert all(tensor.name != "score.weight" for tensor in planned.outputs)
    model = AutoModelForCausalLM.from_config(tiny.tiny_config("bloom", n_layer=2, n_head=8))
    model.save_pretrained(tmp_path / "bloom")
    with pytest.raises(UnsupportedError, match="ALiBi"):
        plan(tmp_path / "bloom", host="auto")


def test_inspect_names_the_hosts(tmp_path: Path) -> None:
    facts = inspect(str(tiny.save_tiny("gpt_neox", tmp_path)))
    assert facts["hosts"] == ["phi", "starcoder2", "nemotron"]
    assert facts["can_convert_to"]["2"] * 4 == facts["kv_bytes_per_token"]


def test_what_differs_under_padding_is_said(tmp_path: Path) -> None:
    """OPT alone counts positions by the mask: with position_ids, as ``generate`` gives them, its host agrees."""
    for name in ("opt", "biogpt", "xglm", "gpt2", "gpt_neo"):
        source = tiny.save_tiny(name, tmp_path / name)
        done = convert(source, tmp_path / f"{name}-host", host="auto")
        models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (source, tmp_path / f"{name}-host")]
        mask = torch.ones_like(tiny.IDS)
        mask[0, :4] = 0
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if name == "opt" else {}
        with torch.no_grad():
            before = models[0](tiny.IDS, attention_mask=mask).logits[mask.bool()]
            after = models[1](tiny.IDS, attention_mask=mask, **places).logits[mask.bool()]
        assert float((before - after).abs().max()) < 1e-4, name
        said = "padded on the left need position_ids" in (tmp_path / f"{name}-host" / "README.md").read_text()
        assert said == ("note" in done.as_json()["host"]) == (name == "opt")


@settings(max_examples=14, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    host=st.sampled_from(["phi", "starcoder2", "nemotron"]),
    kind=st.sampled_from(["default", "linear", "proportional"]),
    factor=st.sampled_from([0.25, 0.45, 0.5, 0.9, 0.95, 1.0]),
)  # fmt: skip
def test_a_host_rotates_as_its_model_did_or_refuses(
    host: str, kind: str, factor: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("neox")
    rope = {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": factor, "factor": 2.0}
    sizes = {"hidden_size": 128, "use_parallel_residual": host == "phi", "rope_parameters": rope}
    source = tiny.save_tiny("gpt_neox", folder / "source", **sizes)
    try:
        convert(source, folder / "out", host=host)
    except UnsupportedError:
        assert factor != 1.0 or kind == "proportional"
        return
    before, after = (tiny.logits(AutoModelForCausalLM.from_pretrained(folder / name)) for name in ("source", "out"))
    assert float((before - after).abs().max()) < 1e-4
