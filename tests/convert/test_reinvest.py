"""Widening: the published sizes, the same logits, new channels that train, and what cannot be widened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import tiny
import torch
from click.testing import CliRunner
from tiny import IDS, logits
from transformers import AutoModelForCausalLM

from checkpoints import write_llama
from rehead.checkpoints.safetensors_io import header_bytes
from rehead.convert import convert, plan, verify
from rehead.convert.commands import plan_command
from rehead.convert.reinvest.arithmetic import BlockSizes, ffn_width, hidden_width, proportional_hidden_width
from rehead.errors import UnsupportedError, UsageError
from rehead.models.families import FAMILIES

FFN = ["llama", "ministral3", "qwen3", "gemma2", "phi3", "glm", "starcoder2", "falcon", "gpt_neox", "gpt2"]
HIDDEN = ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "granite", "olmo2"]


def shared(name: str, folder: Path, **overrides) -> tuple[object, int]:
    """A saved model whose KV heads may be shared for nothing, and down to how many."""
    family = FAMILIES[tiny.model_type_of(name)]
    model = tiny.tiny_model(name, **overrides)
    kv = 1 if family.refusal(model.config, 2) else 2
    planted.change(family, model, planted.equal_heads(kv))
    model.save_pretrained(folder)
    return model, kv


# ---- how wide


def test_published_sizes() -> None:
    chatglm2 = BlockSizes(hidden=4096, heads=32, head_dim=128, ffn=11008, ffn_matrices=3)
    assert ffn_width(chatglm2, before=32, after=1, multiple=128) == 13696
    assert (chatglm2.weights(32) - chatglm2.weights(1)) // (3 * 4096) == 2645
    falcon = BlockSizes(hidden=4096, heads=64, head_dim=64, ffn=4 * 4096, ffn_matrices=2)
    assert proportional_hidden_width(falcon, before=64, after=1) == 4544 == 71 * 64
    assert falcon.weights(64) == 12 * 4096**2


def test_widths_give_back_what_was_freed_and_no_more_than_a_step() -> None:
    sizes = BlockSizes(hidden=4096, heads=32, head_dim=128, ffn=11008, ffn_matrices=3)
    for kv in (1, 2, 4, 8, 16):
        wide = BlockSizes(4096, 32, 128, ffn_width(sizes, 32, kv, 128), 3)
        assert 0 <= wide.weights(kv) - sizes.weights(32) < 3 * 4096 * 128
        wide = BlockSizes(hidden_width(sizes, 32, kv, 64), 32, 128, 11008, 3)
        assert 0 <= wide.weights(kv) - sizes.weights(32) < 64 * (sizes.weights(kv) // 4096)


def test_blocks_without_attention_and_what_else_reads_the_stream_count() -> None:
    sizes = BlockSizes(10, heads=4, head_dim=2, ffn=20, ffn_matrices=3, blocks=2, attention_blocks=1, other=7)
    assert sizes.weights(2) == 10 * (2 * (4 + 2) * 2 + 7) + 2 * 3 * 10 * 20
    assert not sizes.uniform
    assert not BlockSizes(10, 4, 2, 20, 3, other=7).uniform
    assert BlockSizes(10, 4, 2, 20, 3, blocks=2, attention_blocks=2).uniform


def test_whole_heads_fill_the_least_hidden_size_that_is_enough() -> None:
    sizes = BlockSizes(hidden=4096, heads=64, head_dim=64, ffn=4 * 4096, ffn_matrices=2)
    assert proportional_hidden_width(sizes, before=64, after=64) == 4096
    for kv in (1, 2, 4, 8):
        width = proportional_hidden_width(sizes, before=64, after=kv)
        at = [BlockSizes(w, w // 64, 64, 4 * w, 2).weights(kv) for w in (width - 64 * kv, width)]
        assert width % (64 * kv) == 0
        assert at[0] < sizes.weights(64) <= at[1]


def test_plan_shows_the_arithmetic_of_chatglm2(tmp_path: Path) -> None:
    """A LLaMA of ChatGLM2's size, one layer of it, as headers over a hole in the disk."""
    n, f, vocab = 4096, 11008, 64
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": n, "intermediate_size": f,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 1, "vocab_size": vocab,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    block = "model.layers.0."
    shapes = {f"{block}self_attn.{name}_proj.weight": (n, n) for name in "qkvo"}
    shapes |= {f"{block}mlp.{name}_proj.weight": (f, n) for name in ("gate", "up")}
    shapes |= {f"{block}mlp.down_proj.weight": (n, f), f"{block}input_layernorm.weight": (n,)}
    shapes |= {f"{block}post_attention_layernorm.weight": (n,), "model.norm.weight": (n,)}
    shapes |= {"model.embed_tokens.weight": (vocab, n), "lm_head.weight": (vocab, n)}
    header = header_bytes(((name, "BF16", shape) for name, shape in shapes.items()), {"format": "pt"})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(torch.Size(shape).numel() for shape in shapes.values()))
    made = plan(tmp_path, num_key_value_heads=1, reinvest="ffn")
    facts = made.as_json()
    assert made.config.intermediate_size == 13696
    assert facts["reinvest"]["before"] == 11008
    assert "2645.3 channels" in facts["reinvest"]["arithmetic"]
    assert facts["parameters"]["after"] >= facts["parameters"]["before"]
    wide = plan(tmp_path, num_key_value_heads=1, reinvest="hidden", multiple_of=64)
    assert wide.config.hidden_size % 64 == 0
    assert wide.config.head_dim == 128
    assert plan(tmp_path, num_key_value_heads=8, reinvest="hidden").config.hidden_size == 4736
    shapes = {change["name"]: change["after"] for change in facts["changes"]}
    assert shapes == {f"{block}mlp.{name}_proj.weight": [13696, n] for name in ("gate", "up")} | {
        f"{block}mlp.down_proj.weight": [n, 13696],
        **{f"{block}self_attn.{name}_proj.weight": [128, n] for name in "kv"},
    }
    shown = CliRunner().invoke(plan_command, [str(tmp_path), "--kv-heads", "1", "--reinvest", "hidden"])
    assert "model.layers.{i}.self_attn.k_proj.weight  [4096, 4096] -> [128, 4992]  in 1 layers" in shown.output
    assert "  model.norm.weight  [4096] -> [4992]\n" in shown.output, "not said to be in so many layers"


@pytest.mark.parametrize("name", ["bamba", "olmo_hybrid", "qwen3_5_text"])
def test_a_hybrid_gets_back_what_its_attention_layers_freed(name: str, tmp_path: Path) -> None:
    """One layer of two has attention, and every layer an FFN: each FFN takes half of what one attention freed."""
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source = tiny.save_tiny(name, tmp_path)
    pooled, made = (plan(source, num_key_value_heads=1, **o) for o in ({}, {"reinvest": "ffn", "multiple_of": 1}))
    freed = made.as_json()["reinvest"]["freed_per_layer"]
    given = made.as_json()["parameters"]["after"] - pooled.as_json()["parameters"]["after"]
    assert freed <= given < freed + 2 * 3 * 64, "no more than a channel in each layer"
    assert "in 1 attention layers; / (3 FFN matrices x 64 x 2 layers)" in made.as_json()["reinvest"]["arithmetic"]


def test_a_class_that_wants_whole_heads_gets_them(tmp_path: Path) -> None:
    """LLaMA's config refuses a hidden size that its heads do not divide, whatever its head size; Qwen 3's does not."""
    for name, whole in (("llama", True), ("qwen3", False)):
        source = tiny.save_tiny(
            name, tmp_path / name, hidden_size=96, num_attention_heads=6, num_key_value_heads=6, head_dim=16
        )
        made = plan(source, num_key_value_heads=1, reinvest="hidden")
        assert made.config.hidden_size % (24 if whole else 128) == 0
        if whole:
            with pytest.raises(UnsupportedError, match="--multiple-of 24"):
                plan(source, num_key_value_heads=1, reinvest="hidden", multiple_of=16)
        assert plan(source, num_key_value_heads=1, reinvest="hidden", multiple_of=12).config.hidden_size % 12 == 0


# ---- the same function


@pytest.mark.parametrize(("what", "name"), [*(("ffn", n) for n in FFN), *(("hidden", n) for n in HIDDEN)])
def test_wider_computes_the_same_and_trains(what: str, name: str, tmp_path: Path) -> None:
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source, kv = shared(name, tmp_path / "source")
    done = convert(
        tmp_path / "source", tmp_path / "out", num_key_value_heads=kv, reinvest=what, multiple_of=8, host=None
    )
    facts = done.plan.as_json()["reinvest"]
    assert facts["after"] > facts["before"]
    assert facts["after"] % 8 == 0
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = logits(source)
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-5
    model(IDS, use_cache=False).logits.square().mean().backward()
    widened = done.plan.rewrites[-1].tensors
    grown = [name for name in widened if widened[name].changed and not name.endswith("bias")]
    gradients = dict(model.named_parameters())
    sizes = (facts["before"], facts["after"])
    moved = 0
    for name in grown:
        parameter = gradients.get(name)
        if parameter is None or parameter.ndim < 2:
            continue
        axis = next((i for i, size in enumerate(parameter.shape) if size == sizes[1]), None)
        if axis is not None:
            moved += bool(parameter.grad.narrow(axis, sizes[0], sizes[1] - sizes[0]).abs().max() > 0)
    assert moved >= tiny.LAYERS, "whatever is written into the new channels must have a gradient"


def test_widening_follows_calibrated_pooling_and_verifies(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama-mha", tmp_path / "source")
    options = {
        "num_key_value_heads": 2, "method": "svd", "refit": True, "calibration": ["random"],
        "calibration_tokens": 1024, "calibration_length": 32,
    }  # fmt: skip
    convert(source, tmp_path / "narrow", **options)
    done = convert(source, tmp_path / "wide", **options, reinvest="ffn", multiple_of=8)
    narrow, wide = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("narrow", "wide")
    )
    torch.testing.assert_close(logits(wide), logits(narrow), atol=1e-5, rtol=1e-5)
    assert verify(tmp_path / "wide", str(source)).cache_error < 1e-4
    manifest = json.loads((tmp_path / "wide" / "rehead.json").read_text())
    assert manifest["reinvest"]["after"] == done.plan.config.intermediate_size
    assert "intermediate_size" in (tmp_path / "wide" / "README.md").read_text()
    again = convert(source, tmp_path / "again", **options, reinvest="ffn", multiple_of=8)
    first, second = (json.loads((folder / "rehead.json").read_text())["files"] for folder in (done.out, again.out))
    assert first["model.safetensors"] == second["model.safetensors"], "what is drawn is drawn from the seed"


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        (
            "starcoder2",
            {"reinvest": "hidden", "num_key_value_heads": 2},
            UnsupportedError,
            "LayerNorm.*subtract the mean",
        ),
        ("falcon", {"reinvest": "hidden", "num_key_value_heads": 2}, UnsupportedError, "a hidden size of"),
        ("mixtral", {"reinvest": "ffn", "num_key_value_heads": 2}, UnsupportedError, "experts"),
        ("dots1", {"reinvest": "ffn", "num_key_value_heads": 2}, UnsupportedError, "1 of its 2 layers alone"),
        ("bitnet", {"reinvest": "ffn", "num_key_value_heads": 2}, UnsupportedError, "ffn_sub_norm"),
        ("bitnet", {"reinvest": "hidden", "num_key_value_heads": 2}, UnsupportedError, "does not run at another"),
        ("helium", {"reinvest": "hidden", "num_key_value_heads": 2}, UnsupportedError, "use --reinvest ffn"),
        ("bamba", {"reinvest": "hidden", "num_key_value_heads": 2}, UnsupportedError, "refuses a hidden size of"),
        ("recurrent_gemma", {"reinvest": "ffn", "num_key_value_heads": 1}, UnsupportedError, "48 channels where"),
        ("cohere2_moe", {"reinvest": "hidden", "num_key_value_heads": 2}, UnsupportedError, "subtract the mean"),
        ("llama", {"reinvest": "ffn"}, UsageError, "--kv-heads"),
        ("llama", {"reinvest": "ffn", "num_key_value_heads": 4}, UsageError, "nothing is freed"),
        ("llama", {"reinvest": "fnn", "num_key_value_heads": 2}, UsageError, "'ffn'"),
        ("llama", {"multiple_of": 64, "num_key_value_heads": 2}, UsageError, "--reinvest"),
        ("llama", {"reinvest": "ffn", "multiple_of": 0, "num_key_value_heads": 2}, UsageError, "1 or more"),
    ],
)
def test_refuses_what_would_not_be_exact(name: str, options: dict, error: type, says: str, tmp_path: Path) -> None:
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    source = tiny.save_tiny(name, tmp_path)
    with pytest.raises(error, match=says) as caught:
        plan(source, **options)
    assert "\n" not in str(caught.value)


def test_the_caller_keeps_his_random_numbers(tmp_path: Path) -> None:
    tiny.save_tiny("llama", tmp_path / "llama")
    state = torch.get_rng_state()
    plan(tmp_path / "llama", num_key_value_heads=1, reinvest="hidden")
    plan(tmp_path / "llama", num_key_value_heads=1, reinvest="ffn")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("what", ["ffn", "hidden"])
def test_a_class_that_is_only_on_record_is_built_at_other_widths(what: str, tmp_path: Path) -> None:
    """As the command line has it, which plans common classes without transformers as long as it can."""
    source = write_llama(tmp_path / "source")
    told = ["--kv-heads", "2", "--reinvest", what, "--multiple-of", "8", "--json"]
    done = subprocess.run([sys.executable, "-m", "rehead", "plan", source, *told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = plan(source, num_key_value_heads=2, reinvest=what, multiple_of=8).as_json()
    assert json.loads(done.stdout)["reinvest"] == here["reinvest"]
