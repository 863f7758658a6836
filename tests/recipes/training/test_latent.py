"""Uptraining a latent that Rehead stored: at a natural scale while it trains, at the stored one afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rehead.convert import convert, verify
from rehead.errors import UnsupportedError
from rehead.recipes import uptrain
from rehead.recipes.training.lanes import lanes_off
from rehead.recipes.training.output import changed_tensors
from rehead.variants.latent.gauge import LANE_DEFAULT

TEXT = {"calibration": ["random"], "calibration_tokens": 1024, "calibration_length": 32}
IDS = torch.arange(48).view(2, 24) * 7 % 300


@pytest.fixture(scope="module")
def latent(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent") / "out"
    convert(tiny.teacher, out, latent=8, rope_dims=4, **TEXT)
    return out


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def factored(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with queries in two factors."""
    out = tmp_path_factory.mktemp("factored") / "out"
    convert(tiny.teacher, out, latent=8, rope_dims=4, engine="llama.cpp", **TEXT)
    return out


def test_queries_in_two_factors_are_the_same_function(latent: Path, factored: Path) -> None:
    with torch.no_grad():
        torch.testing.assert_close(loaded(factored)(IDS).logits, loaded(latent)(IDS).logits, atol=1e-5, rtol=1e-5)
    tensors = load_file(factored / "model.safetensors")
    through = tensors["model.layers.0.self_attn.q_a_proj.weight"]
    assert torch.equal(through, through[0, 0] * torch.eye(len(through)))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "count"), [("latent", 2), ("factored", 4)])
def test_lanes_off_is_the_same_function_and_comes_back_the_same(
    kind: str, count: int, request: pytest.FixtureRequest
) -> None:
    model = loaded(request.getfixturevalue(kind))
    before, weights = model(IDS).logits, {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    lanes = lanes_off(model, "student")
    assert len(lanes.ranks) == count
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    rows = model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight
    assert float(rows.norm(dim=1).amin()) / float(rows.norm(dim=1).amax()) > 0.01
    back = lanes.stored(changed_tensors(model, dict(model.named_parameters())))
    assert all(torch.allclose(give(), weights[name], rtol=1e-6, atol=0) for name, give in back.items())


def test_a_latent_comes_nearer_to_its_teacher_and_stays_one(latent: Path, tiny, tmp_path: Path) -> None:
    events: list[dict] = []
    options = tiny.options(tokens=8192, eval_data=[tiny.held], eval_every=8)
    uptrain(latent, tmp_path / "out", teacher=str(tiny.teacher), **options, on_event=events.append)
    kl = [event["kl"] for event in events if event["event"] == "evaluation"]
    assert kl[-1] < 0.8 * kl[0]
    assert verify(tmp_path / "out", str(tiny.teacher)).cache_error < 1e-4
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    norm = tensors["model.layers.0.self_attn.kv_a_layernorm.weight"]
    assert bool((norm == LANE_DEFAULT).all())
    old = load_file(latent / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    change = (tensors[name] - old[name])[:8].norm() / old[name][:8].norm()
    assert 1e-3 < float(change) < 1


def test_biases_of_queries_are_refused(latent: Path) -> None:
    model = loaded(latent)
    attention = model.model.layers[1].self_attn
    attention.q_a_layernorm, attention.q_a_proj = torch.nn.RMSNorm(33), torch.nn.Linear(32, 33)
    torch.nn.init.constant_(attention.q_a_layernorm.weight, LANE_DEFAULT)
    with pytest.raises(UnsupportedError, match="biases of its queries"):
        lanes_off(model, "student")
