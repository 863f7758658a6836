"""The table's claims against the classes: heads turned as far as a claim goes compute the same, at every odd size."""

from __future__ import annotations

from typing import Any

import planted
import pytest
import tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rehead.models.families import FAMILIES

TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "proportional": {},
}


def with_rope(raw: Any, kind: str, factor: float) -> Any:
    """A config's dictionary with another rotation in every part that has one."""
    if not isinstance(raw, dict):
        return raw
    if raw.get("rope_theta") is not None and "rope_type" in raw:
        return raw | {"rope_type": kind, "partial_rotary_factor": factor} | TYPES[kind]
    return {key: with_rope(value, kind, factor) for key, value in raw.items()}


def odd_model(name: str, size: int, kind: str, factor: float) -> torch.nn.Module | None:
    """A tiny model with heads of ``size`` that rotate as said; None where its class cannot run so."""
    heads = {"hidden_size": tiny.HEADS * size} if "head_dim" not in tiny.tiny_config(name).to_dict() else {}
    try:
        raw = tiny.tiny_config(name, head_dim=size, **heads).to_dict()
        raw = with_rope(raw, kind, factor) | (
            {"partial_rotary_factor": factor} if "partial_rotary_factor" in raw else {}
        )
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        tiny.randomize(model, scale=0.6, redraw=True)
        model = model.float().eval()
        tiny.logits(model)
    except Exception:
        return None
    return model


def turned_apart(name: str, model: torch.nn.Module) -> float:
    """How far logits move, of their size, when every head but the first is turned as far as the table lets svd."""
    family = FAMILIES[tiny.model_type_of(name)]
    before = tiny.logits(model)
    planted.tie_norm_pairs(family, model)
    before = tiny.logits(model)
    planted.change(family, model, planted.rotated_heads(1, "svd"))
    return float((tiny.logits(model) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", [name for name in [*FAMILIES, *tiny.VARIANTS] if tiny.available(name)])
def test_an_odd_number_of_rotary_dimensions_is_what_the_class_makes_of_it(name: str) -> None:
    """16 dimensions by 0.45 are 7.2: some classes turn four pairs, some none but whole heads, some refuse."""
    model = odd_model(name, 16, "default", 0.45)
    if model is None:
        pytest.skip("the class does not run so")
    assert turned_apart(name, model) < 2e-4


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    name=st.sampled_from([name for name in FAMILIES if tiny.available(name)]),
    size=st.sampled_from([6, 8, 10, 12, 16, 20]),
    kind=st.sampled_from(sorted(TYPES)),
    factor=st.sampled_from([0.25, 0.3, 0.5, 0.75, 0.9, 1.0]),
)
def test_heads_turned_within_the_claimed_freedom_leave_logits_alone(
    name: str, size: int, kind: str, factor: float
) -> None:
    model = odd_model(name, size, kind, factor)
    assert model is None or turned_apart(name, model) < 2e-4
