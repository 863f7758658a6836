"""Latent attention as a conversion: what is written computes what was fitted, and what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import IDS, loaded, logits
from transformers import AutoModelForCausalLM

from rehead.convert import convert, inspect, plan, verify
from rehead.convert.commands import convert_command, plan_command
from rehead.convert.options import ConvertOptions
from rehead.errors import ReheadError, UnsupportedError, UsageError
from rehead.models.distance import distances
from rehead.variants.latent import rewrite
from rehead.variants.latent.module import LatentAttention

CALIBRATION: dict[str, Any] = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}


def live(source: Path, latents: dict[str, Any]) -> torch.Tensor:
    """Logits of the original with its attentions replaced, each at its natural scale."""
    model = loaded(source)
    for prefix, latent in latents.items():
        model.set_submodule(prefix.rstrip("."), LatentAttention(latent))
    return logits(model)


@pytest.mark.parametrize("host", ["deepseek_v3", "youtu"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen2", {"fit": 3}),
        ("qwen2", {"fold_biases": True}),
        ("qwen3", {"fit": 3}),
        ("mistral", {}),
    ],
)
def test_saved_equals_live(kind: str, options: dict, host: str, tmp_path: Path, monkeypatch) -> None:
    extra = {"sliding_window": None} if kind == "mistral" else {}
    source = tiny.save_tiny(kind, tmp_path / "source", **extra)
    latents, real = {}, rewrite.layer_tensors

    def note(latent: Any, prefix: str, *args: Any, **more: Any) -> Any:
        latents.update({prefix: latent} if prefix else {})
        return real(latent, prefix, *args, **more)

    monkeypatch.setattr(rewrite, "layer_tensors", note)
    convert(source, tmp_path / "out", latent=24, rope_dims=8, host=host, **options, **CALIBRATION)
    want = live(source, latents)
    got = logits(loaded(tmp_path / "out"))
    assert len(latents) == tiny.LAYERS
    assert float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))
    assert verify(tmp_path / "out", str(source)).cache_error < 1e-5


def test_one_kv_head_is_exact_at_full_size_and_more_rank_is_never_worse(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source", num_key_value_heads=1)
    want, lost = logits(loaded(source)), []
    for rank in (4, 8, 18):
        out = tmp_path / str(rank)
        convert(source, out, latent=rank, rope_dims=16, **CALIBRATION)
        lost.append(distances(want.flatten(0, 1), logits(loaded(out)).flatten(0, 1)).mean_kl)
    assert lost[0] > lost[1] > lost[2]
    assert lost[2] < 1e-6


def test_refit_and_fit_recover_and_the_summary_says_what_is_lost(tmp_path: Path) -> None:
    from click.testing import CliRunner

    source = tiny.save_tiny("llama", tmp_path / "source")
    line = [str(source), str(tmp_path / "out"), "--kv-cache", "25%", "--rope-dims", "8", "--refit", "--fit", "20"]
    line += ["--calibration", "random", "--calibration-tokens", "2048", "--calibration-length", "32"]
    done = CliRunner().invoke(convert_command, line)
    assert done.exit_code == 0, done.output
    for word in ("closed form", "attention error", "block error", "deepseek_v3", "FLOPs", "every rank"):
        assert word in done.output
    manifest = json.loads((tmp_path / "out" / "rehead.json").read_text())
    assert manifest["latent"]["numbers_per_token"] == {"before": 128, "after": 32}
    assert set(manifest["layers"]["0"]) == {"lost", "output_error", "fit_loss", "block_error"}
    convert(source, tmp_path / "plain", kv_cache="25%", rope_dims=8, **CALIBRATION)
    apart = [verify(tmp_path / name, str(source)).against_source["mean_kl"] for name in ("out", "plain")]
    assert apart[0] < apart[1]
    assert "latent attention" in (tmp_path / "out" / "README.md").read_text()
    assert inspect(tmp_path / "out")["kv_bytes_per_token"] == tiny.LAYERS * 32 * 4
    with pytest.raises(UnsupportedError, match="latent"):
        convert(tmp_path / "out", tmp_path / "again", num_key_value_heads=1)


def test_the_text_chooses_the_pairs_that_keep_turning(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    text = CALIBRATION | {"calibration_length": 128, "calibration_tokens": 2048}
    done = convert(source, tmp_path / "out", kv_cache="50%", **text)
    facts = done.as_json()["latent"]
    assert facts["rope_dims"] % 8 == 0
    assert facts["rank"] + facts["rope_dims"] == 64
    kept = json.loads((tmp_path / "out" / "rehead.json").read_text())["calibration"]["latent"]
    assert sum(kept["turning"]) == pytest.approx(1, abs=1e-3)
    assert facts["rope_dims"] == min(map(int, kept["tried"]), key=lambda dims: kept["tried"][str(dims)])
    assert IDS.shape[1] > 0
    with pytest.raises(UsageError, match="too short to tell"):
        convert(source, tmp_path / "short", kv_cache="50%", **text | {"calibration_length": 16})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"latent": 7}, UsageError, "even"),
        ({"latent": 200}, UsageError, "span 64"),
        ({"latent": 8, "rope_dims": 5}, UsageError, "even"),
        ({"latent": 8, "rope_dims": 18}, UsageError, "rotate 16"),
        ({"latent": 8, "kv_cache": "33%"}, UsageError, "give one"),
        ({"kv_cache": "a third"}, UsageError, "33%"),
        ({"kv_cache": "100%"}, UsageError, "below 100%"),
        ({"kv_cache": "8", "rope_dims": 8}, UsageError, "nothing of them for the latent"),
        ({"rope_dims": 8}, UsageError, "--latent"),
        ({"latent": 8, "num_key_value_heads": 1}, UsageError, "one of them"),
        ({"latent": 8, "method": "svd"}, UsageError, "--method svd: says nothing"),
        ({"latent": 8, "grouping": "similar"}, UsageError, "--grouping similar: says nothing"),
        ({"num_key_value_heads": 1, "fold_biases": True}, UsageError, "--fold-biases: says nothing"),
        ({"latent": 8, "host": "gemma"}, UsageError, "choose one of deepseek_v3"),
        ({"latent": 8, "dtype": "float16"}, UnsupportedError, "bfloat16"),
        ({"engine": "llama.cpp", "num_key_value_heads": 1}, UsageError, "--for: says nothing"),
        ({"variants": ["latent"]}, UsageError, "rank=R"),
        ({"variants": ["latent:rank=9"]}, UsageError, "even"),
    ],
)
def test_sizes_and_targets_that_cannot_be_are_refused_in_one_line(options, error, said, tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    with pytest.raises(error) as caught:
        plan(source, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_llama_cpp_gets_queries_in_two_factors_unless_it_has_a_bias_or_knows_the_model(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"latent": 24, "rope_dims": 8, "engine": "llama.cpp"}
    source = tiny.save_tiny("mistral", tmp_path / "source", sliding_window=None)
    assert plan(source, **asked).raw_config["q_lora_rank"] == loaded(source).config.hidden_size
    assert plan(source, **asked | {"engine": None}).raw_config["q_lora_rank"] is None
    known = tiny.save_tiny("mistral", tmp_path / "known", sliding_window=None, num_hidden_layers=27)
    assert plan(known, **asked).raw_config["q_lora_rank"] is None
    with pytest.raises(UnsupportedError, match="biases"):
        plan(tiny.save_tiny("qwen2", tmp_path / "biased"), **asked)


def test_vllm_gets_a_head_of_its_own_where_it_is_the_embedding(tmp_path: Path) -> None:
    source = tiny.save_tiny("mistral", tmp_path / "source", sliding_window=None, tie_word_embeddings=True)
    for name, engine in (("plain", None), ("for vllm", "vllm")):
        convert(source, tmp_path / name, latent=24, rope_dims=8, engine=engine, **CALIBRATION)
    want, got = (logits(loaded(tmp_path / name)) for name in ("plain", "for vllm"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert "lm_head.weight" in load_file(tmp_path / "for vllm" / "model.safetensors")
    assert not json.loads((tmp_path / "for vllm" / "config.json").read_text())["tie_word_embeddings"]
    assert verify(tmp_path / "for vllm", str(source)).cache_error < 1e-5
    cards = [(tmp_path / name / "README.md").read_text() for name in ("plain", "for vllm")]
    assert "Converted with `--for llama.cpp` or `--for vllm` it serves there." in cards[0]
    assert "--for vllm` it" not in cards[1]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("gemma3_text", "no place"), ("gemma2", "no place"), ("mistral", "windows"), ("gpt2", "no place")],
)
def test_models_that_no_host_holds_are_refused_with_the_reason(kind: str, said: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(kind, tmp_path / "source")
    with pytest.raises(ReheadError, match=said):
        plan(source, latent=16, rope_dims=8)


def test_a_plan_reads_no_weights_and_prints_the_costs(tmp_path: Path) -> None:
    from click.testing import CliRunner

    source = tiny.save_tiny("llama", tmp_path / "source")
    done = CliRunner().invoke(plan_command, [str(source), "--kv-cache", "50%"])
    assert done.exit_code == 0, done.output
    assert "128 -> 64 numbers per layer" in done.output
    facts = plan(source, kv_cache="50%").as_json()
    assert facts["kv_bytes_per_token"]["after"] * 2 == facts["kv_bytes_per_token"]["before"]


def test_norms_on_keys_are_made_linear_and_the_manifest_says_how_nearly(tmp_path: Path, monkeypatch) -> None:
    source = tiny.save_tiny("qwen3", tmp_path / "source", attention_bias=False)
    monkeypatch.setattr(rewrite, "LEAST_R2", 0.9999)
    convert(source, tmp_path / "out", latent=24, rope_dims=16, refit=True, fit=40, **CALIBRATION)
    layers = json.loads((tmp_path / "out" / "rehead.json").read_text())["layers"]
    assert all(0 <= layer["nonlinear"] < 0.9 for layer in layers.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["q_lora_rank"]) == (False, None)
    assert verify(tmp_path / "out", str(source)).cache_error < 1e-5
    with pytest.raises(UnsupportedError, match="linear rows explain only"):
        convert(source, tmp_path / "closed", latent=24, rope_dims=16, **CALIBRATION)


def test_folded_biases_leave_nothing_that_engines_do_not_read(tmp_path: Path) -> None:
    source = tiny.save_tiny("qwen2", tmp_path / "source")
    convert(source, tmp_path / "out", latent=24, rope_dims=8, fold_biases=True, **CALIBRATION)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["q_lora_rank"]) == (False, None)
    layers = json.loads((tmp_path / "out" / "rehead.json").read_text())["layers"]
    assert all(0 <= layer["bias_error"] <= 1 for layer in layers.values())


def test_a_fit_of_latents_gets_more_text_of_two_lengths_unless_told() -> None:
    fitted = ConvertOptions.parse({"kv_cache": "33%", "refit": True, "fit": "300"})
    assert (fitted.calibration_tokens, fitted.calibration_lengths) == (262144, (512, 2048))
    closed = ConvertOptions.parse({"latent": 96})
    assert (closed.calibration_tokens, closed.calibration_lengths) == (131072, (512, 2048))
    told = ConvertOptions.parse({"latent": 96, "fit": 300, "calibration_tokens": 8192, "calibration_length": 1024})
    assert (told.calibration_tokens, told.calibration_lengths) == (8192, (1024,))
    pooled = ConvertOptions.parse({"num_key_value_heads": 1, "method": "svd", "fit": 300, "refit": True})
    assert (pooled.calibration_tokens, pooled.calibration_lengths) == (131072, (2048,))


def test_float16_holds_latents_at_a_scale_of_its_own(tmp_path: Path) -> None:
    source = planted(tmp_path / "source", 12)
    convert(source, tmp_path / "out", latent=12, rope_dims=16, dtype="float16", half_scale=True, **CALIBRATION)
    want, got = logits(loaded(source)), logits(loaded(tmp_path / "out"))
    assert float((got - want).norm() / want.norm()) < 2e-2
    assert "Q8_0" in (tmp_path / "out" / "README.md").read_text()


def planted(folder: Path, rank: int) -> Path:
    """A tiny llama whose keys are, by rotary pair, complex multiples of one head's, and whose values have one rank."""
    from safetensors.torch import load_file, save_file

    source = tiny.save_tiny("llama", folder, attention_bias=False)
    weights, g = load_file(source / "model.safetensors"), torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    for name, weight in weights.items():
        if "k_proj.weight" in name:
            key = weight.unflatten(0, (tiny.KV_HEADS, 2, -1))  # real parts, imaginary parts
            lead = torch.complex(key[0, 0], key[0, 1])
            turned = torch.complex(draw(tiny.KV_HEADS, len(lead)), draw(tiny.KV_HEADS, len(lead)))[..., None] * lead
            weights[name] = torch.stack([turned.real, turned.imag], 1).flatten(0, 2).contiguous()
        if "v_proj.weight" in name:
            weights[name] = draw(len(weight), rank) @ draw(rank, weight.shape[1]) * weight.std() / rank**0.5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


def test_planted_keys_and_values_convert_exactly_and_kl_falls_with_the_rank(tmp_path: Path) -> None:
    source = planted(tmp_path / "source", 12)
    want, lost = logits(loaded(source)), []
    for rank in (4, 8, 12, 64):
        out = tmp_path / str(rank)
        convert(source, out, latent=rank, rope_dims=16, **CALIBRATION)
        got = logits(loaded(out))
        lost.append(distances(want.flatten(0, 1), got.flatten(0, 1)).mean_kl)
        if rank >= 12:
            assert float((got - want).abs().max()) <= (1e-5 if rank == 12 else 1e-4) * float(want.abs().max())
    assert lost[0] > lost[1] > 100 * max(lost[2:])


def test_bfloat16_loses_no_more_than_twice_what_it_costs_the_source(tmp_path: Path) -> None:
    source = planted(tmp_path / "source", 12)
    convert(source, tmp_path / "out", latent=12, rope_dims=16, dtype="bfloat16", **CALIBRATION)
    want = logits(loaded(source))
    half = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.bfloat16) for at in (source, tmp_path / "out")]
    of_source, of_latent = (float((logits(model).float() - want).square().mean().sqrt()) for model in half)
    assert of_latent <= 2 * of_source
