"""T5: the decoder's self- and cross-attention with fewer KV heads, the encoder and the position bias as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from rehead.convert import convert, inspect, plan, verify
from rehead.convert.commands import inspect_command, plan_command
from rehead.errors import UnsupportedError
from rehead.models.modeling.modeling_rehead_cache import returned_cache

SIZES = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip
FORMS = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
IDS = torch.arange(24).view(2, 12) * 7 % 90 + 2
MASK = torch.ones_like(IDS)
MASK[0, 9:] = 0
TARGETS = torch.arange(20).view(2, 10) * 5 % 90 + 2


def make(folder: Path, form: str, kv: int | None = None) -> T5ForConditionalGeneration:
    """A random T5; with ``kv``, its decoder's KV heads are equal within as many groups."""
    torch.manual_seed(0)
    config = T5Config(**SIZES, **FORMS[form])
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
            if "relative_attention_bias" in name:
                parameter.mul_(10)
            if kv and name.startswith("decoder") and name.endswith(("Attention.k.weight", "Attention.v.weight")):
                heads = parameter.view(kv, 4 // kv, 8, 32)
                heads[:] = heads[:, :1].clone()
    model.save_pretrained(folder)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=TARGETS, use_cache=False).logits


def loaded(folder: Path, **options):
    options = {"attn_implementation": "eager"} | options
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv", [2, 1])
def test_equal_heads_give_the_same_logits_and_text(form: str, kv: int, tmp_path: Path) -> None:
    source = make(tmp_path / "source", form, kv)
    done = convert(tmp_path / "source", tmp_path / "out", num_key_value_heads=kv)
    assert len(done.layers) == 4
    assert (tmp_path / "out" / "modeling_rehead_t5.py").exists()
    model = loaded(tmp_path / "out")
    assert model.config.model_type == "rehead_t5"
    assert model.config.scale_decoder_outputs is source.config.scale_decoder_outputs
    attention = model.decoder.block[1].layer[1].EncDecAttention
    assert attention.k.weight.shape == (kv * 8, 32)
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out", attn_implementation="sdpa")), logits(source), atol=1e-5, rtol=1e-5
    )
    for beams in (1, 2):
        options = {"attention_mask": MASK, "max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams}
        options["do_sample"] = False
        made = model.generate(IDS, return_dict_in_generate=True, **options)
        assert torch.equal(made.sequences, source.generate(IDS, **options))
    cache = returned_cache(model(input_ids=IDS, decoder_input_ids=TARGETS, use_cache=True))
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        assert part.layers[0].keys.shape[1] == kv
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    kept = [name for name in before if not name.endswith(("Attention.k.weight", "Attention.v.weight"))]
    kept += [name for name in before if name.startswith("encoder")]
    assert all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("method", ["first", "random", "procrustes"])
def test_other_methods_verify_and_the_result_trains(method: str, tmp_path: Path) -> None:
    make(tmp_path / "source", "v1.1")
    convert(tmp_path / "source", tmp_path / "out", num_key_value_heads=2, method=method)
    found = verify(tmp_path / "out", str(tmp_path / "source"))
    assert found.cache_error < 1e-5
    assert not found.plain
    assert found.against_source["mean_kl"] > 1e-4
    model = loaded(tmp_path / "out").train()
    model(input_ids=IDS, labels=TARGETS).loss.backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    again = convert(tmp_path / "out", tmp_path / "one", num_key_value_heads=1, method=method)
    assert again.plan.as_json()["num_key_value_heads"] == {"before": 2, "after": 1}
    assert verify(tmp_path / "one", str(tmp_path / "out")).cache_error < 1e-5


def test_the_plan_and_inspection_name_the_decoder_alone(tmp_path: Path) -> None:
    make(tmp_path / "source", "v1.0")
    facts = plan(tmp_path / "source", num_key_value_heads=2).as_json()
    assert all(change["name"].startswith("decoder.block.") for change in facts["changes"])
    assert len(facts["changes"]) == 8
    assert facts["kv_bytes_per_token"]["after"] * 2 == facts["kv_bytes_per_token"]["before"] == 2 * 4 * 4 * 8 * 4
    assert inspect(str(tmp_path / "source"))["can_convert_to"].keys() == {"1", "2"}
    assert "4 attentions of the decoder" in CliRunner().invoke(inspect_command, [str(tmp_path / "source")]).output
    shown = CliRunner().invoke(plan_command, [str(tmp_path / "source"), "--kv-heads", "1"])
    assert shown.exit_code == 0, shown.output
    assert "decoder.block.{i}.layer.1.EncDecAttention.k.weight  [32, 32] -> [8, 32]  in 2 layers" in shown.output
    same = convert(tmp_path / "source", tmp_path / "same", num_key_value_heads=4)
    assert same.plan.config.model_type == "t5"
    assert json.loads((tmp_path / "same" / "config.json").read_text())["model_type"] == "t5"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "svd"}, "calibrated layer by layer"),
        ({"refit": True}, "calibrated layer by layer"),
        ({"grouping": "similar"}, "position bias"),
        ({"reinvest": "hidden"}, "--reinvest hidden"),
        ({"block": "parallel"}, "serial blocks only"),
    ],
)
def test_what_it_cannot(options: dict, says: str, tmp_path: Path) -> None:
    make(tmp_path / "source", "v1.0")
    with pytest.raises(UnsupportedError, match=says) as error:
        plan(tmp_path / "source", num_key_value_heads=2, **options)
    assert "\n" not in str(error.value)


def test_loads_in_a_fresh_process_with_rehead_or_by_its_own_file(tmp_path: Path) -> None:
    """Importing rehead must not import T5, and the file beside the weights must do without rehead."""
    make(tmp_path / "source", "v1.1")
    convert(tmp_path / "source", tmp_path / "out", num_key_value_heads=2)
    code = (
        "import sys, torch\n"
        "path, out, own = sys.argv[1:]\n"
        "if own == 'rehead': import rehead\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM\n"
        "assert 'transformers.models.t5.modeling_t5' not in sys.modules\n"
        "options = {} if own == 'rehead' else {'trust_remote_' + 'code': True}\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32, **options)\n"
        "assert own == 'rehead' or not any(name.split('.')[0] == 'rehead' for name in sys.modules)\n"
        "ids = torch.arange(6)[None] + 2\n"
        "torch.save(model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False), out)\n"
    )
    wanted = loaded(tmp_path / "out").generate(
        torch.arange(6)[None] + 2, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    for own in ("rehead", "file"):
        args = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / own), own]
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert torch.equal(torch.load(tmp_path / own, weights_only=True), wanted)
