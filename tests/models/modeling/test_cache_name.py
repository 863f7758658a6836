"""The cache is named as the installed transformers names it, and in one place only."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rehead
from rehead.benchmarks.tiny import tiny_model
from rehead.models.modeling import modeling_rehead_cache as naming
from rehead.models.modeling.modeling_rehead_cache import cache_argument, either_name, passed_cache, returned_cache

ROOT = Path(rehead.__file__).parent
TOKENS = torch.arange(12)[None]


def test_models_name_the_cache_so():
    model = tiny_model("llama")
    assert naming.NAME in inspect.signature(model.forward).parameters
    first = model(TOKENS[:, :8], use_cache=True)
    rest = model(TOKENS[:, 8:], **cache_argument(returned_cache(first)))
    torch.testing.assert_close(rest.logits, model(TOKENS).logits[:, 8:])


def test_no_other_file_spells_the_old_name():
    allowed = {"modeling_rehead_cache.py", "conftest.py", Path(__file__).name}
    files = [
        path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.parts[len(ROOT.parts) :])
    ]
    spelled = [
        path
        for path in files
        if path.name not in allowed and "past_key_values" in path.read_text().replace("past_key_values_length", "")
    ]
    assert files
    assert not spelled


@pytest.mark.parametrize("name", naming.NAMES)
def test_a_cache_is_found_under_every_name(name):
    assert passed_cache({"use_cache": True, name: "it"}) == "it"
    assert passed_cache({name: None}) is None


def test_outputs_without_a_cache():
    assert returned_cache(SimpleNamespace(logits=1)) is None
    assert cache_argument(None) == {}


def test_a_forward_takes_either_name():
    @either_name
    def forward(states, cache=None, **kwargs):
        return states, cache, kwargs

    for call in ({naming.OLD: 2}, {naming.NEW: 2}):
        assert forward(1, **call, more=3) == (1, 2, {"more": 3})
    assert forward(1, 2) == (1, 2, {})
