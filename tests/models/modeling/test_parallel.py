"""The modelling file that travels with parallel checkpoints: by import, by auto_map, with a cache, in training."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError, UsageError
from rehead.models.modeling import carried_files, modeling_file, parallel_config, parallel_families, serial_config
from rehead.models.modeling import modeling_rehead_parallel as modeling
from rehead.patches import patch_model
from rehead.recipes.training.models import checkpoint_activations

TOKENS = torch.randint(8, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, model_type: str, layers: list[int], **config) -> torch.nn.Module:
    """A parallel checkpoint as a conversion writes it: tensors as they were, another config, the file beside them."""
    model = tiny_model(model_type, **config)
    model.save_pretrained(folder)
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(parallel_config(given, layers)))
    for name, text in carried_files(parallel_config(given, layers)).items():
        (folder / name).write_text(text)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("model_type", sorted(parallel_families()))
def test_equals_the_live_patch(model_type, tmp_path):
    serial = checkpoint(tmp_path, model_type, [1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__module__ == modeling.__name__
    assert [type(layer).__name__.startswith("Parallel") for layer in loaded.model.layers][:2] == [False, True]
    with patch_model(serial, "parallel", layers=[1]):
        assert torch.equal(logits(loaded), logits(serial))
    assert list(loaded.state_dict()) == list(serial.state_dict())


def test_generates_with_a_cache_what_it_computes_without(tmp_path):
    checkpoint(tmp_path, "llama", [0, 1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    written = [
        model.generate(TOKENS[:, :8], max_new_tokens=10, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*written)


def test_trains_saves_and_loads_again(tmp_path):
    checkpoint(tmp_path / "one", "llama", [0, 1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one").train()
    checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    model.eval().save_pretrained(tmp_path / "two")
    for file in (modeling_file(), modeling_file("modeling_rehead_core")):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rehead_parallel.ParallelLlamaForCausalLM"
    assert config["parallel_layers"] == [0, 1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()), logits(model))


def test_a_model_can_be_pickled(tmp_path):
    """As torch.save and processes that are spawned do."""
    checkpoint(tmp_path, "llama", [0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = pickle.loads(pickle.dumps(model))
    assert type(again.model.layers[0]) is type(model.model.layers[0])
    assert torch.equal(logits(again), logits(model))


def test_the_model_without_a_head(tmp_path):
    serial = checkpoint(tmp_path, "qwen2", [0])
    model = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad(), patch_model(serial, "parallel", layers=[0]):
        assert torch.equal(model(TOKENS).last_hidden_state, serial.model(TOKENS).last_hidden_state)


def test_its_blocks_are_seen_as_parallel_and_can_be_fused(tmp_path):
    checkpoint(tmp_path, "llama", [1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    before = logits(model)
    with patch_model(model, "parallel", layers=[1], fused=True) as patch:
        assert patch.exact
        patch.prove()
    with patch_model(model, "serial") as patch:
        assert patch.layers == [1]
    assert torch.equal(logits(model), before)


def test_layers_are_kept_whole_on_a_device(tmp_path):
    checkpoint(tmp_path, "llama", [1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {"LlamaDecoderLayer", "ParallelLlamaDecoderLayer"} <= set(model._no_split_modules)
    assert len(model(TOKENS, output_hidden_states=True).hidden_states) == 3


WITHOUT_REHEAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not any(name.split(".")[0] == "rehead" for name in sys.modules)
tokens = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(tokens, use_cache=False).logits, sys.argv[3])
"""

REHEAD_FIRST = """
import sys
import rehead
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import AutoConfig
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "rehead_parallel_llama"
"""


def test_auto_map_without_rehead(tmp_path):
    serial = checkpoint(tmp_path / "model", "llama", [0, 1])
    torch.save(TOKENS, tmp_path / "tokens")
    command = [sys.executable, "-c", WITHOUT_REHEAD, "model", "tokens", "logits"]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment, timeout=120)
    with patch_model(serial, "parallel"):
        torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), logits(serial))


def test_importing_rehead_first_loads_nothing_and_registers(tmp_path):
    checkpoint(tmp_path, "llama", [0])
    command = [sys.executable, "-c", REHEAD_FIRST, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def test_configs_there_and_back():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 8}
    partly = parallel_config(config, [2, 0, 2])
    assert partly["parallel_layers"] == [0, 2]
    assert partly["model_type"] == "rehead_parallel_llama"
    assert parallel_config(partly, [1])["parallel_layers"] == [1]
    assert serial_config(partly) == parallel_config(partly, []) == serial_config(config) == config
    with pytest.raises(UsageError, match="layer 4 does not exist"):
        parallel_config(config, [4])
    with pytest.raises(UsageError, match="layer -1 does not exist"):
        parallel_config(config, [-1])
    with pytest.raises(UnsupportedError, match="'gpt2' has no parallel class"):
        parallel_config({"model_type": "gpt2"}, [0])


def test_wrong_layers_in_a_config_are_refused():
    with pytest.raises(ValueError, match="parallel_layers has 2"):
        modeling.ParallelLlamaConfig(num_hidden_layers=2, parallel_layers=[2])
    assert modeling.parallel_layers(modeling.ParallelLlamaConfig(num_hidden_layers=2)) == [0, 1]
    assert AutoConfig.for_model("rehead_parallel_mistral", num_hidden_layers=3).model_type == "rehead_parallel_mistral"
    with pytest.raises(AttributeError):
        _ = modeling.ParallelNothingConfig
