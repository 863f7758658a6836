"""Which list of modules holds a model's decoder layers."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaConfig

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError
from rehead.models.live import decoder_layers


def stack(count: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


class Model(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=3)
        for name, part in parts.items():
            self.add_module(name, part)


def test_a_longer_tower_is_not_taken_for_the_decoder() -> None:
    model = Model(tower=stack(9, 8), layers=stack(3, 4), heads=stack(3, 2))
    assert decoder_layers(model) is model.layers


def test_where_the_config_counts_otherwise() -> None:
    inner = nn.ModuleList(nn.ModuleList([stack(5, 2)]) for _ in range(4))
    model = Model(layers=inner, few=stack(2, 64))
    assert decoder_layers(model) is inner
    with pytest.raises(UnsupportedError, match="llama: its layers cannot be found"):
        decoder_layers(Model())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gpt_neox", "opt"])
def test_models(name: str) -> None:
    model = tiny_model(name)
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert all("Layer" in type(layer).__name__ or "Block" in type(layer).__name__ for layer in layers)
