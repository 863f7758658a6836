"""RoPE in written configs, also under the names that transformers 4 and other engines read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rehead.convert import convert
from rehead.errors import UnsupportedError
from rehead.models.config import resolve_config, with_older_rope
from rehead.models.families import FAMILIES

TYPES: list[dict[str, Any]] = [
    {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


def older_reader(raw: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters as transformers 4 takes them out of a config: by theirs names, with a default theta."""
    scaling = dict(raw.get("rope_scaling") or {"rope_type": "default"})
    factor = {"partial_rotary_factor": raw["partial_rotary_factor"]} if "partial_rotary_factor" in raw else {}
    return scaling | {"rope_theta": raw.get("rope_theta", 10000.0)} | factor


@settings(max_examples=120, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    name=st.sampled_from([name for name in FAMILIES if tiny.available(name)]), kind=st.sampled_from(TYPES),
    theta=st.sampled_from([1e4, 5e5]), factor=st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_both_spellings_say_the_same(name: str, kind: dict[str, Any], theta: float, factor: float | None) -> None:
    raw = json.loads(tiny.tiny_config(name).to_json_string())
    flat = raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in flat.values()) or "rope_theta" not in flat:
        assert with_older_rope(raw, name).items() >= raw.items()
        return
    for older in ("rope_theta", "rope_scaling", "partial_rotary_factor"):  # that some classes write too
        raw.pop(older, None)
    raw["rope_parameters"] = kind | {"rope_theta": theta} | ({"partial_rotary_factor": factor} if factor else {})
    written = with_older_rope(raw, name)
    try:
        resolve_config(raw, name)
    except UnsupportedError:
        return  # its class has a rotation of its own
    assert resolve_config(written, name).rope_parameters == resolve_config(raw, name).rope_parameters
    if written != raw:
        assert older_reader(written) == raw["rope_parameters"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "nemotron", "olmo3"])
def test_a_conversion_writes_both(name: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(name, tmp_path / "source")
    convert(source, tmp_path / "out", num_key_value_heads=tiny.KV_HEADS)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    full = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
    assert raw["rope_theta"] == full["rope_theta"]
    assert ("rope_local_base_freq" in raw) == (name == "gemma3_text")
    assert raw.get("partial_rotary_factor") == full.get("partial_rotary_factor")
    before, after = (tiny.logits(AutoModelForCausalLM.from_pretrained(f)) for f in (source, tmp_path / "out"))
    assert before.equal(after)


def test_windows_of_another_base_are_left_out(tmp_path: Path) -> None:
    raw = json.loads(tiny.tiny_config("laguna").to_json_string())
    assert with_older_rope(raw, "laguna") == raw
