"""One command for a budget: what it chooses, writes, measures and refuses."""

import json

import pytest
import torch
from click.testing import CliRunner

from rehead.convert.budget.commands import spans
from rehead.convert.budget.meet import meet
from rehead.convert.commands import convert_command
from rehead.errors import QualityError, UnsupportedError, UsageError
from rehead.models.cache_layouts import config_layouts
from rehead.models.config import resolve_config
from rehead.models.layout import cache_bytes
from tests.helpers.far_layer import CONTEXT, planted_model
from tests.helpers.probes import one_line
from tests.helpers.tiny import VOCAB, loaded, tiny_model

ASKED = {
    "calibration": ["random"], "calibration_tokens": 2048, "tokens": 1024, "context": CONTEXT, "fit": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def met(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("met") / "out"
    return meet(planted, out, "40%", **ASKED), out


def test_the_cache_that_was_asked_for(met, planted):
    result, out = met
    config = json.loads((out / "config.json").read_text())
    before = config_layouts(resolve_config(json.loads((planted / "config.json").read_text()), "source"))
    after = config_layouts(resolve_config(config, "out"))
    share = cache_bytes(after, CONTEXT) / cache_bytes(before, CONTEXT)
    assert share <= 0.4
    assert result.share == pytest.approx(share, abs=1e-3)


def test_what_reads_far_stays_and_the_manifest_says_why(met):
    result, out = met
    assert 2 not in result.selection.choice
    assert result.measured.kl < 0.02
    told = json.loads((out / "rehead.json").read_text())["calibration"]["budget"]
    assert set(told["layers"]) == {str(layer) for layer in result.selection.choice}
    assert told["rivals"]
    assert told["path"]


def test_what_was_measured_is_what_was_written(met, planted):
    _, out = met
    ids = torch.randint(0, VOCAB, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = loaded(planted)(ids).logits.log_softmax(-1), _as_anybody(out)(ids).logits.log_softmax(-1)
    assert float((old.exp() * (old - new)).sum(-1).mean()) < 0.02


def _as_anybody(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_for_an_engine_only_what_it_serves(planted, tmp_path):
    result = meet(planted, tmp_path / "out", "45%", engine="vllm", **ASKED)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "auto_map" not in config
    assert any("vLLM" in reason for reason in result.facts["not_offered"].values())


def test_for_an_engine_with_the_layer_wise_fit(tmp_path):
    """At so short a context no window saves anything: one latent in all layers, fitted, in the engine's class."""
    model = tiny_model("llama", 0, attention_bias=False, max_position_embeddings=CONTEXT)
    model.save_pretrained(tmp_path / "model")
    result = meet(tmp_path / "model", tmp_path / "out", "33%", engine="vllm", **{**ASKED, "context": 100, "fit": 2})
    (name,) = set(result.facts["layers"].values())
    assert name.startswith("latent:")
    assert result.share <= 0.33
    told = json.loads((tmp_path / "out/rehead.json").read_text())
    assert told["options"]["fit"] == 2
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "deepseek_v3"
    assert 0 < result.measured.kl < 2 * result.selection.measured.kl


def test_the_smallest_cache_within_a_loss(planted, tmp_path):
    line = [str(planted), str(tmp_path / "out"), "--kl", "0.02", "--calibration", "random", "--calibration-tokens",
            "2048", "--tokens", "1024", "--context", str(CONTEXT), "--fit", "0"]  # fmt: skip
    done = CliRunner().invoke(convert_command, line, catch_exceptions=False)
    assert done.exit_code == 0
    assert "verdict" in done.output
    assert "usable: KL 0.0" in done.output


def test_both_limits_are_a_gate(planted, tmp_path):
    with pytest.raises(QualityError, match="more than --kl 1e-09") as error:
        meet(planted, tmp_path / "out", "40%", kl=1e-9, **ASKED)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_cache": "40%", "window": 16}, "--window: says which form layers take"),
        ({"kv_cache": "40%", "num_key_value_heads": 1}, "--kv-heads: says which form layers take"),
        ({}, "a budget needs a limit"),
        ({"kv_cache": "0.01%"}, "the nearest is"),
        ({"kv_cache": "40%", "context": 4096}, "positions for 512"),
    ],
)
def test_limits_that_cannot_be(planted, tmp_path, options, says):
    with pytest.raises(UsageError, match=says) as error:
        meet(planted, tmp_path / "out", **{**ASKED, **options})
    one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["130%", "0%", "0", "100000", "third"])
def test_a_size_that_cannot_be_is_refused_before_the_model_is_run(planted, tmp_path, monkeypatch, size):
    monkeypatch.setattr("rehead.convert.budget.meet.survey", None)
    with pytest.raises(UsageError, match=f"--kv-cache {size}"):
        meet(planted, tmp_path / "out", size, **ASKED)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_serves_none_of_the_choices(planted, tmp_path, monkeypatch):
    monkeypatch.setattr("rehead.convert.budget.holders.deciding_runs", lambda *args: {})
    with pytest.raises(UnsupportedError, match=r"--for llama\.cpp: nothing that saves cache is served") as error:
        meet(planted, tmp_path / "out", "40%", engine="llama.cpp", **ASKED)
    assert "has not been run on" in one_line(error)


def test_spans_of_layers():
    assert spans([0, 2, 3, 4, 7]) == "0,2-4,7"
