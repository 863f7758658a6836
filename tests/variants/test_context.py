"""A longer context by other rotary frequencies: what configs say, what stays exact, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import loaded, logits
from transformers import AutoConfig, DynamicCache

from rehead.benchmarks.tiny import tiny_model
from rehead.convert import convert, plan, verify
from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import resolve_config
from rehead.models.families.spec import steady_length
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model
from rehead.variants.context.fit import fit_factors
from rehead.variants.context.options import ROPES, SHORT_EXACT, ContextOptions
from rehead.variants.context.rope import ntk_theta, stretched, yarn_factors

LONG = torch.randint(8, 90, (1, 160), generator=torch.Generator().manual_seed(3))
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "cohere", "gemma3_text", "smollm3"])
def test_live_and_saved_are_one_function_and_short_texts_stay(kind: str, rope: str, tmp_path: Path) -> None:
    if (rope == "drope" and kind not in ("llama", "smollm3")) or (kind == "phi3" and rope not in SHORT_EXACT[1:]):
        pytest.skip("no class holds it")
    source = tiny.save_tiny(kind, tmp_path / "source")
    factors = {"rope_factors": _factors(source)} if rope == "fitted" else {}
    convert(source, tmp_path / "out", context=512, rope=rope, **factors)
    verify(tmp_path / "out", str(source))
    before, after = loaded(source), loaded(tmp_path / "out")
    with torch.no_grad():
        want, long = before(LONG, use_cache=False).logits, after(LONG, use_cache=False).logits
        told = {"factors": factors["rope_factors"]} if factors else {}
        with patch_model(before, "context", tokens=512, rope=rope, **told):
            torch.testing.assert_close(before(LONG, use_cache=False).logits, long, atol=1e-5, rtol=1e-5)
        assert torch.equal(before(LONG, use_cache=False).logits, want)
    assert not torch.equal(long, want)
    assert torch.equal(logits(before), logits(after)) == (rope in SHORT_EXACT)
    sizes = after.config.max_position_embeddings, steady_length(after.config)
    assert sizes == {"dynamic": (128, 128), "longrope": (512, 128), "fitted": (512, 128)}.get(rope, (512, 512))


def _factors(source: Path) -> tuple[float, ...]:
    rope = plan(source, context=512, rope="longrope").raw_config["rope_parameters"]
    count = len(rope.get("full_attention", rope)["long_factor"])
    return tuple(1.0 + 0.3 * pair for pair in range(count))


@pytest.mark.parametrize("rope", ["yarn", "ntk", "longrope", "dynamic"])
def test_classes_of_ours_stretch_as_those_that_they_derive_from(rope: str, tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "windows", window=8, sinks=2, context=512, rope=rope)
    convert(source, tmp_path / "parallel", block="parallel", context=512, rope=rope)
    for name, patch, options in (("windows", "window", {"size": 8, "sinks": 2}), ("parallel", "parallel", {})):
        live, after = loaded(source), loaded(tmp_path / name)
        with patch_model(live, patch, **options), patch_model(live, "context", tokens=512, rope=rope), torch.no_grad():
            want = live(LONG, use_cache=False).logits
            torch.testing.assert_close(after(LONG, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)


def test_the_config_has_older_names_too(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    for rope in ("linear", "yarn", "longrope"):
        raw = plan(source, context=512, rope=rope).raw_config
        assert raw["rope_scaling"]["rope_type"] == rope
        assert raw["rope_scaling"]["factor"] == 4.0
        older = {key: value for key, value in raw.items() if key != "rope_parameters"}
        read = [resolve_config(each, "x").rope_parameters for each in (raw, older)]
        assert read[0] == read[1]


def test_layers_by_themselves(tmp_path: Path) -> None:
    """Single layers need a class that says layer by layer how they rotate."""
    source = tiny.save_tiny("llama", tmp_path / "source", attention_bias=False)
    out = convert(source, tmp_path / "out", context=512, rope="drope", layers="1").out
    assert AutoConfig.from_pretrained(out).no_rope_layers == [1, 0]
    ntk = convert(source, tmp_path / "ntk", context=512, rope="ntk", layers="0").out
    config = AutoConfig.from_pretrained(ntk)
    assert config.model_type == "granite_swa"
    assert config.layer_rope_theta == [ntk_theta(10000.0, 4.0, 16), 10000.0]
    live = loaded(source)
    for rope, layers, saved in (("drope", [1], out), ("ntk", [0], ntk)):
        with patch_model(live, "context", tokens=512, rope=rope, layers=layers), torch.no_grad():
            got = live(LONG, use_cache=False).logits
        torch.testing.assert_close(got, loaded(saved)(LONG, use_cache=False).logits.detach(), atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="leave --layers out"):
        plan(source, context=512, rope="yarn", layers="0")


@given(st.floats(1.01, 64.0), st.sampled_from([64, 2048, 8192]), st.sampled_from([1e4, 1e5, 1e6]))
@settings(max_examples=40, deadline=None)
def test_factors_lie_between_1_and_the_stretch(factor: float, trained: int, theta: float) -> None:
    factors = yarn_factors(theta, 64, trained, factor)
    assert factors == sorted(factors)
    assert factors[0] == pytest.approx(1.0)
    assert all(1 - 1e-9 <= each <= factor * (1 + 1e-9) for each in factors)
    slowest = theta ** -(62 / 64)
    assert ntk_theta(theta, factor, 64) ** -(62 / 64) == pytest.approx(slowest / factor)


@given(st.sampled_from(["linear", "ntk", "yarn", "longrope", "dynamic"]), st.integers(129, 100_000))
@settings(max_examples=40, deadline=None)
def test_transformers_takes_every_form_as_it_is_written(rope: str, tokens: int) -> None:
    options = ContextOptions.parse({"tokens": tokens, "rope": rope})
    made = stretched(PLAIN, 16, 128, options)
    raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": tokens}
    assert resolve_config({**raw, "rope_parameters": made}, "x").rope_parameters == made


def test_yarn_is_transformers_own() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 32768}
    rope = stretched(PLAIN, 64, 8192, ContextOptions.parse({"tokens": 32768}))
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](resolve_config({**raw, "rope_parameters": rope}, "x"), None)
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ours = plain / torch.tensor(yarn_factors(10000.0, 64, 8192, 4.0), dtype=torch.float64)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_a_cache_of_keys_rotated_for_less_is_refused(rope: str, tmp_path: Path) -> None:
    live = loaded(tiny.save_tiny("llama", tmp_path / "source"))
    with patch_model(live, "context", tokens=512, rope=rope), torch.no_grad():
        cache = DynamicCache(config=live.config)
        live(LONG[:, :120], **cache_argument(cache))
        live(LONG[:, 120:128], **cache_argument(cache))
        with pytest.raises(UsageError, match="128 tokens, where its frequencies change"):
            live(LONG[:, 128:129], **cache_argument(cache))
        whole = live(LONG, use_cache=False).logits
        long = DynamicCache(config=live.config)
        live(LONG[:, :150], **cache_argument(long))
        if rope == "longrope":  # whose long frequencies stay
            torch.testing.assert_close(live(LONG[:, 150:], **cache_argument(long)).logits, whole[:, 150:])
        else:
            with pytest.raises(UsageError, match="read it again"):
                live(LONG[:, 150:], **cache_argument(long))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("llama", {"context": 128}, "reads 128 tokens already"),
        ("llama", {"context": 64}, "reads 128 tokens already"),
        ("llama", {"context": 512, "rope": "longrope", "rope_factors": [0.5] * 8}, "0.5 is below 1"),
        ("llama", {"context": 512, "rope": "longrope", "rope_factors": [2.0]}, "1 numbers for 8 rotary pairs"),
        ("llama", {"num_key_value_heads": 2, "rope": "yarn"}, "--rope: says nothing without --context"),
        ("llama", {"context": 512, "layers": "auto:1"}, "not measured for --context"),
        ("llama", {"context": 512, "window": 8, "layers": "0"}, "give one of them"),
        ("llama", {"context": 512, "latent": 8}, "does not go together"),
        ("qwen3", {"context": 512, "rope": "drope"}, "cannot stand in"),
        ("phi3", {"context": 512, "rope": "yarn"}, "takes no rope_type yarn; give --rope longrope"),
        ("phimoe", {"context": 512, "rope": "yarn"}, "takes no rope_type yarn; give --rope ntk"),
        ("phimoe", {"context": 512, "rope": "longrope"}, "takes no rope_type longrope; give --rope ntk"),
        ("gptj", {"context": 512}, "convert it with --host auto"),
        ("granite_swa", {"context": 512, "rope": "yarn"}, "give --rope ntk or drope"),
        ("smollm3", {"context": 512, "rope": "drope", "layers": "1"}, "1 is not a layer that rotates; choose from 0$"),
        ("llama", {"context": 512, "rope_factors": [2.0] * 8}, "--rope yarn has factors of its own"),
        ("gpt2", {"context": 512, "rope": "linear"}, "no rotary pairs; leave --rope out"),
        ("llama", {"variants": ["context:tokens=512,table=repeat"]}, "no table of positions; leave table out"),
        ("lfm2", {"variants": ["temperature:layers=0"]}, "0 is not a layer with attention; choose from 1$"),
        ("jamba", {"context": 512}, "neither rotary positions nor a table"),
        ("gpt2", {"context": 512, "layers": "0"}, "all layers share"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(kind: str, options: dict, said: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(kind, tmp_path / "source")
    with pytest.raises((UsageError, UnsupportedError), match=said) as caught:
        plan(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("phimoe", {}, "does not compute yarn .*short_mscale.*; give rope=ntk"),
        ("phimoe", {"rope": "longrope"}, "does not compute longrope .*short_mscale.*; give rope=ntk"),
        ("falcon-rw", {}, "neither rotary positions nor a table"),
        ("gpt2", {}, "has a table of positions; convert it"),
        ("persimmon", {}, "how its heads rotate is not known"),
        ("granite_swa", {}, "convert it by ntk or drope"),
        ("gptj", {}, "convert it with --host auto"),
        ("smollm3", {"layers": "1"}, "1 is not a layer that rotates; choose from 0$"),
    ],
)
def test_live_models_are_refused_with_a_way_that_works_and_left_as_they_were(
    kind: str, options: dict, said: str
) -> None:
    model = tiny.tiny_model(kind)
    with (
        pytest.raises((UsageError, UnsupportedError), match=said) as caught,
        patch_model(model, "context", tokens=512, **options),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_fault_of_the_model_is_not_said_to_be_one_of_its_rope() -> None:
    model = tiny.tiny_model("llama")

    def fails(*args: Any) -> None:
        raise KeyError("of another kind")

    hook = model.model.layers[0].mlp.register_forward_pre_hook(fails)
    with pytest.raises(KeyError, match="of another kind"), patch_model(model, "context", tokens=512):
        pass
    hook.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("first", ["", "trained=8,"])
def test_dynamic_counts_from_the_trained_length_until_it_is_stretched_otherwise(first: str, tmp_path: Path) -> None:
    """In a checkpoint its class reads that length as the longest text."""
    source = tiny.save_tiny("llama", tmp_path / "source")
    dynamic = convert(source, tmp_path / "dynamic", variants=[f"context:{first}tokens=1024,rope=dynamic"]).out
    live = loaded(source)
    with patch_model(live, "context", tokens=1024, rope="dynamic", trained=8 if first else None):
        want = logits(live, LONG)
    torch.testing.assert_close(logits(loaded(dynamic), LONG), want, atol=1e-4, rtol=1e-4)
    assert not torch.equal(want, logits(loaded(source), LONG))
    for rope, host in (("drope", "smollm3"), ("ntk", "granite_swa")):
        with pytest.raises(UnsupportedError, match=r"stretched already \(dynamic\)"):
            convert(dynamic, tmp_path / "out", context=2048, rope=rope, layers="0", host=host)


def test_the_ways_that_refusals_name_work(tmp_path: Path) -> None:
    for kind, options in (("phimoe", {"rope": "ntk"}), ("gptj", {"host": "auto"}), ("granite_swa", {"rope": "drope"})):
        source = tiny.save_tiny(kind, tmp_path / kind / "source")
        convert(source, tmp_path / kind / "out", context=512, **options)
        verify(tmp_path / kind / "out", str(source))
        assert loaded(tmp_path / kind / "out")(LONG).logits.isfinite().all()


def test_a_stretched_model_is_not_stretched_again_unless_it_can_be(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    linear = convert(source, tmp_path / "linear", context=256, rope="linear").out
    assert plan(linear, context=512, rope="linear").raw_config["rope_parameters"]["factor"] == 4.0
    convert(linear, tmp_path / "long", context=512, rope="longrope")
    torch.testing.assert_close(logits(loaded(tmp_path / "long")), logits(loaded(linear)), atol=1e-5, rtol=1e-5)
    yarn = convert(source, tmp_path / "yarn", context=256, rope="yarn").out
    with pytest.raises(UnsupportedError, match=r"stretched already \(yarn\)"):
        plan(yarn, context=512)


def test_fitted_factors_lower_the_loss_and_leave_no_trace(tmp_path: Path) -> None:
    model = tiny_model("llama")
    rows = torch.randint(8, 120, (4, 32), generator=torch.Generator().manual_seed(0))
    parts = {name: dict(module.__dict__) for name, module in model.named_modules()}
    before = model(rows, use_cache=False).logits
    fitted = fit_factors(model, rows, ContextOptions.parse({"tokens": 4 * int(model.config.max_position_embeddings),
                                                            "rope": "fitted"}), steps=4)  # fmt: skip
    assert fitted.after <= fitted.before
    assert all(factor >= 1 for factor in fitted.factors)
    assert torch.equal(model(rows, use_cache=False).logits, before)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        n: set(p) for n, p in parts.items()
    }
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fitted_is_said_in_the_manifest_and_does_the_same_when_told_its_factors(tmp_path: Path) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    text = {"calibration": ["random"], "calibration_tokens": 512, "calibration_length": 32}
    made = convert(source, tmp_path / "out", context=512, rope="fitted", **text)
    told = json.loads((tmp_path / "out" / "rehead.json").read_text())["calibration"]["fitted_context"]
    assert tuple(told["factors"]) == made.plan.options.rope_factors
    convert(source, tmp_path / "again", context=512, rope="longrope", rope_factors=told["factors"])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(loaded(source)), logits(loaded(tmp_path / "out")))


def test_fitted_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Where a recorded class answers first and transformers comes later."""
    source = tiny.save_tiny("llama", tmp_path / "source", attention_bias=False)
    line = f"convert {source} {tmp_path / 'out'} --context 512 --rope fitted --calibration random --quiet"
    few = ["--calibration-tokens", "256", "--calibration-length", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "rehead", *line.split(), *few], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["longrope", "dynamic"]), st.integers(1, 40), st.lists(st.integers(1, 20), max_size=4))
def test_a_patched_checkpoint_is_right_or_refuses_to_pass_its_threshold(
    rope: str, first: int, parts: list[int]
) -> None:
    """Keys that were rotated for a shorter text are never read: each step is what one pass gives, or is refused."""
    model = _stretched(rope)
    cache, done = DynamicCache(config=model.config), 0
    with patch_model(model, "tiled"), torch.no_grad():
        for size in (first, *parts):
            tokens = LONG[:, done : done + size]
            stale = done and done + size > 16 and (rope == "dynamic" or done <= 16)
            if stale:
                with pytest.raises(UsageError, match="16 tokens, where its frequencies change"):
                    model(tokens, **cache_argument(cache))
                return
            done += size
            whole = model(LONG[:, :done], use_cache=False).logits[:, -size:]
            torch.testing.assert_close(model(tokens, **cache_argument(cache)).logits, whole, atol=1e-4, rtol=1e-4)


@functools.cache
def _stretched(rope: str) -> Any:
    """A tiny model with the config of a longer context, made from one of 16 tokens."""
    model = tiny_model("llama", max_position_embeddings=16)
    asked = ContextOptions.parse({"tokens": 64, "rope": rope})
    dims, length = model.config.head_dim, 16 if rope == "dynamic" else 64
    rope_parameters = stretched(dict(model.config.rope_parameters), dims, 16, asked)
    return tiny_model("llama", max_position_embeddings=length, rope_parameters=rope_parameters)


def test_generating_past_the_threshold_is_refused_and_the_card_tells_what_plain_transformers_does(
    tmp_path: Path,
) -> None:
    source = tiny.save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "out", context=512, rope="longrope")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "change where a text passes 128 tokens. Plain transformers does not notice" in card
    convert(source, tmp_path / "yarn", context=512)
    assert "Plain transformers does not notice" not in (tmp_path / "yarn" / "README.md").read_text()
    model = loaded(tmp_path / "out")
    asked = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    with patch_model(model, "tiled"):
        with pytest.raises(UsageError, match="read it again in one pass"):
            model.generate(LONG[:, :126], **asked)
        long = model.generate(LONG[:, :140], **asked)
        assert torch.equal(long, model.generate(LONG[:, :140], use_cache=False, **asked))


def test_what_an_engine_reads_is_written_for_it_or_refused(tmp_path: Path) -> None:
    """vLLM takes a factor for queries and keys from keys of its own; neither engine computes dynamic frequencies."""
    source = tiny.save_tiny("llama", tmp_path / "source")
    for engine in (None, "vllm"):
        out = tmp_path / str(engine)
        convert(source, out, context=256, rope="longrope", engine=engine)
        rope = json.loads((out / "config.json").read_text())["rope_parameters"]
        card = (out / "README.md").read_text()
        assert [rope.get(key) for key in ("short_mscale", "long_mscale")] == (
            [None] * 2 if engine is None else [1.0] * 2
        )
        assert ("`--for vllm` it serves there" in card) == (engine is None)
        assert ("not so on texts of the original length" in card) == (engine == "vllm")
    results = [logits(loaded(tmp_path / name)) for name in ("None", "vllm")]
    assert torch.equal(*results)
    for rope, engine in (("dynamic", "vllm"), ("dynamic", "llama.cpp"), ("longrope", "llama.cpp")):
        with pytest.raises(UnsupportedError, match=f"--for {engine}: .* type {rope}; give --rope yarn"):
            convert(source, tmp_path / "no", context=256, rope=rope, engine=engine)
    assert not (tmp_path / "no").exists()
    convert(source, tmp_path / "yarn", context=256, engine="llama.cpp")
    assert "stretched RoPE computed" in (tmp_path / "yarn" / "README.md").read_text()
