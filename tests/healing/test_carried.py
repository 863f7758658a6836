"""What layers hand on besides hidden states reaches the layers behind them: keys and values that later layers share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rehead.checkpoints.source import LocalSource
from rehead.healing.layerwise import LayerwiseModel
from rehead.healing.runner import Runner, TextState
from rehead.models.model import Model
from rehead.models.ranks import Ranks

gemma4 = pytest.importorskip("transformers.models.gemma4.configuration_gemma4")


def test_layers_that_share_keys_and_values_run_one_by_one_as_the_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = gemma4.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8, max_position_embeddings=64,
    )  # fmt: skip
    config.output_hidden_states = True  # or transformers 5.23 stumbles over inputs for each layer that are not there
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = plain.state_dict()
    shared = [name for name in state if name.startswith("model.layers.3.") and ".k_proj." in name]
    assert not shared  # the last layers have no keys of their own
    plain.save_pretrained(tmp_path)
    # No family reads such heads, so that it cannot be opened as what is converted; its layers run all the same.
    family: Any = SimpleNamespace(layer="model.layers.{i}.")
    model = Model(LocalSource(tmp_path), config, family, list(range(4)))
    ids = [torch.arange(60).view(5, 12) % 64, torch.arange(40).view(2, 20) * 3 % 64]
    seen: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for part in ids:
            seen.append([])
            note = lambda module, args, out: seen[-1].append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
            hooks = [layer.register_forward_hook(note) for layer in plain.model.layers]
            plain.model(input_ids=part, use_cache=False)
            for hook in hooks:
                hook.remove()
        runner = Runner(LayerwiseModel(model, config, torch.device("cpu")), 24)
        text = TextState(runner.model.embed(ids, 24))
        for layer in range(4):
            runner.model.load_layer(layer)
            before = text.clone()
            runner.run(layer, text)
            for index in range(2):
                torch.testing.assert_close(text.hidden[index], seen[index][layer], atol=1e-5, rtol=1e-5)
            # Some sequences alone, in any order, find what was handed on to them.
            rows = torch.tensor([1, 0])
            torch.testing.assert_close(runner.call(layer, before, 0, rows), text.hidden[0][rows], atol=1e-5, rtol=1e-5)
            runner.model.unload_layer(layer)
        # Three processes that share the sequences get the same; one of them has none of the longer ones.
        for rank in range(3):
            shared = LayerwiseModel(model, config, torch.device("cpu"))
            runner = Runner(shared, 24, Ranks(rank, 3, shared.device), {12: 5, 20: 2})
            share = TextState(shared.embed(ids, 24, rank, 3))
            for layer in range(4):
                shared.load_layer(layer)
                runner.run(layer, share)
            for part, whole in zip(share.hidden, text.hidden):
                torch.testing.assert_close(part, whole[rank::3], atol=1e-5, rtol=1e-5)
        assert text.carried[0]["shared_kv_states"].keys() == {"sliding_attention", "full_attention"}
        keys, _ = text.carried[1]["shared_kv_states"]["full_attention"]
        assert keys.shape[0] == 2
