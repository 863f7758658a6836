"""What is recorded of transformers' classes is what they say, and enough for `inspect` and `plan` to start fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from rehead.benchmarks import known as recording
from rehead.checkpoints.source import LocalSource
from rehead.convert import inspect, plan
from rehead.models.families import known
from rehead.models.families.known import COMPARED, KnownConfig, known_classes, known_config
from rehead.models.meta import load_report, shapes_of

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 96,
    "intermediate_size": 48, "num_key_value_heads": 4, "rope_theta": 10000.0,
}  # fmt: skip
#: Parts of a record from which shapes and facts come.
DECIDES = ("architecture", "defaults", "free", "aliases", "shapes")
#: Saves a model whose config is plain: no biases where the class's default has none.
NO_BIAS = {"llama": {"attention_bias": False}, "qwen3": {"attention_bias": False}, "olmo2": {"attention_bias": False}}


def saved(model_type: str, folder: Path) -> Path:
    return tiny.save_tiny(model_type, folder, **NO_BIAS.get(model_type, {}))


@pytest.mark.parametrize("model_type", sorted(known_classes()))
def test_the_record_is_what_the_installed_classes_say(model_type: str) -> None:
    if not tiny.available(model_type):
        pytest.skip("the installed transformers lacks it")
    table = json.loads(recording.FILE.read_text(encoding="utf-8"))
    installed, recorded = json.loads(json.dumps(recording.entry_of(model_type))), table["classes"][model_type]
    if table["transformers"] != transformers.__version__:  # what decides, as every version that is supported has it
        installed, recorded = ({key: entry[key] for key in DECIDES} for entry in (installed, recorded))
    assert installed == recorded


def test_classes_that_nobody_compared_are_asked_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    known_classes.cache_clear()
    monkeypatch.setattr(known, "version", lambda name: f"{COMPARED[0]}.{COMPARED[1] + 1}.0.dev0")
    try:
        assert known_config(LLAMA) is None
    finally:
        known_classes.cache_clear()


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": 60}, {"hidden_size": "64"}, {"head_dim": 0}, {"num_key_value_heads": 3},
        {"attention_bias": True}, {"mlp_bias": True}, {"rope_theta": -1.0},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": "linear"}, {"quantization_config": {"quant_method": "gptq"}}, {"architectures": ["Other"]},
        {"eos_token_id": "x"}, {"num_hidden_layers": 0}, {"auto_map": {}}, {"initializer_range": 2.0},
        {"per_layer_config": {}}, {"layer_types": ["full_attention"] * 2}, {"dtype": "int8"},
        {"num_attention_heads": True}, {"sliding_window": 8}, {"tie_word_embeddings": 1}, {"rope_theta": None},
    ],
    ids=lambda odd: next(iter(odd)),
)  # fmt: skip
def test_anything_unusual_is_left_to_the_class(odd: dict[str, Any]) -> None:
    assert isinstance(known_config(LLAMA), KnownConfig)
    assert known_config(LLAMA | odd) is None


def test_what_is_not_recorded_comes_from_the_class() -> None:
    config = known_config(LLAMA)
    assert config is not None
    assert config.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"
    with pytest.raises(AttributeError):
        config.layer_types  # noqa: B018


@pytest.mark.parametrize("change", ["none", "missing", "stray", "shape", "layer"])
def test_a_checkpoint_with_other_tensors_is_not_taken_as_known(change: str, tmp_path: Path) -> None:
    with LocalSource(saved("llama", tmp_path / "m")) as source:
        config = known_config(source.config)
        assert config is not None
        infos = dict(source.tensors)
        report = load_report(config.real(), shapes_of(infos))
        assert not report  # the class itself agrees
        assert not report.ignored
        shapes = {name: info.shape for name, info in infos.items()}
        if change == "missing":
            shapes.pop("model.norm.weight")
        elif change == "stray":
            shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
        elif change == "shape":
            shapes["model.layers.1.mlp.up_proj.weight"] = (47, 64)
        elif change == "layer":
            shapes = {name: shape for name, shape in shapes.items() if ".layers.1." not in name}
        assert config.known.holds(shapes, config) == (change == "none")


QUICK = """
import json, sys
from rehead.convert import inspect, plan
folder, how, result = sys.argv[1], json.loads(sys.argv[2]), {}
result["inspect"] = inspect(folder)
result["plan"] = plan(folder, **how).as_json()
print(json.dumps([sorted({"torch", "transformers", "numpy"} & set(sys.modules)), result]))
"""


@pytest.mark.parametrize("method", ["mean", "svd"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_inspect_and_plan_say_the_same_without_torch(model_type: str, method: str, tmp_path: Path) -> None:
    folder = saved(model_type, tmp_path / "m")
    how = {"num_key_value_heads": 2, "method": method}
    heavy, result = quick(folder, how)
    assert heavy == []
    assert result["inspect"] == json.loads(json.dumps(inspect(folder)))
    assert result["plan"] == json.loads(json.dumps(plan(folder, **how).as_json()))


def test_a_model_beyond_the_record_still_answers(tmp_path: Path) -> None:
    folder = tiny.save_tiny("phi3", tmp_path / "m")
    heavy, result = quick(folder, {"num_key_value_heads": 2})
    assert "torch" in heavy
    assert result["inspect"] == json.loads(json.dumps(inspect(folder)))


def quick(folder: Path, how: dict[str, Any]) -> Any:
    """(heavy modules loaded, facts) of `inspect` and `plan` in a process of their own."""
    line = [sys.executable, "-c", QUICK, str(folder), json.dumps(how)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
