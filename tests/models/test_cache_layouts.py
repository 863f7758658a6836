"""A layer's layout holds as many bytes as transformers' own caches do, windows and chunks included."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import DeepseekV3Config, DynamicCache, StaticCache

from rehead.convert import convert, inspect
from rehead.convert.commands import inspect_command, plan_command
from rehead.models.cache_layouts import config_layouts
from rehead.models.layout import CONTEXTS, cache_bytes, windows
from rehead.models.model import open_model

WINDOWED = ["gemma2", "gemma3_text", "gpt_oss", "cohere2", "mistral", "ministral", "phi3", "olmo3", "granite_swa"]
OTHERS = ["llama", "qwen3", "qwen2", "starcoder2", "gpt_neox", "bamba", "qwen3_5_text", "llama4_text", "smollm3"]


def filled(cache, layouts, context: int) -> dict[int, int]:
    """Bytes in each layer of a cache that has been handed a prompt and one more token; nothing is stored."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[layouts[0].itemsize]
    sizes = {}
    for layout in layouts:
        for tokens in (context - 1, 1):
            shape = (1, layout.num_key_value_heads, tokens)
            key = torch.empty(*shape, layout.key_dim, dtype=dtype, device="meta")
            cache.layers[layout.index].update(key, key.new_empty(*shape, layout.value_dim))
        kept = cache.layers[layout.index]
        sizes[layout.index] = kept.keys.nbytes + kept.values.nbytes
    return sizes


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", [*WINDOWED, *OTHERS])
def test_a_dynamic_cache_holds_what_the_layout_says(name: str, context: int) -> None:
    if not tiny.available(name):
        pytest.skip("not in the installed transformers")
    config = tiny.tiny_config(name, **({"sliding_window": 600} if name in WINDOWED else {}))
    layouts = config_layouts(config)
    assert bool(windows(layouts)) is (name in WINDOWED or name == "llama4_text" or name in ("starcoder2",))
    sizes = filled(DynamicCache(config=config), layouts, context)
    assert sizes == {layout.index: layout.cache_bytes(context) for layout in layouts}
    assert sum(sizes.values()) == cache_bytes(layouts, context)


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_static_cache_holds_the_token_at_hand_besides(context: int) -> None:
    """It writes a token into its window before it attends, where a dynamic one holds what came before."""
    config = tiny.tiny_config("gemma3_text", sliding_window=600)
    layouts = config_layouts(config)
    cache = StaticCache(config=config, max_cache_len=context)
    for layout in layouts:
        key = torch.empty(1, layout.num_key_value_heads, 1, layout.key_dim, dtype=torch.bfloat16)
        cache.layers[layout.index].lazy_initialization(key, key)
        kept = cache.layers[layout.index]
        own = 0 if layout.window is None else 2 * layout.numbers_per_token
        assert kept.keys.nbytes + kept.values.nbytes == layout.cache_bytes(context) + own


def test_a_latent_is_one_head_of_its_rank_and_the_rotated_key() -> None:
    config = DeepseekV3Config(num_hidden_layers=2, kv_lora_rank=48, qk_rope_head_dim=16)
    layouts = config_layouts(config)
    assert [layout.numbers_per_token for layout in layouts] == [64, 64]
    sizes = filled(DynamicCache(config=config), layouts, 1024)
    assert sizes == {layout.index: layout.cache_bytes(1024) for layout in layouts}


def test_windows_show_in_inspect_plan_card_and_manifest(tmp_path) -> None:
    source = tiny.save_tiny("gemma3_text", tmp_path / "source", sliding_window=600)
    facts, layouts = inspect(source), open_model(source).layouts
    assert facts["windows"] == [600]
    assert facts["cache_bytes"] == {str(context): cache_bytes(layouts, context) for context in CONTEXTS}
    assert facts["kv_bytes_per_token"] == cache_bytes(layouts, 1)
    said = CliRunner().invoke(inspect_command, [str(source)]).output
    assert f"{facts['cache_bytes']['8192']:,} bytes" in said
    planned = CliRunner().invoke(plan_command, [str(source), "--kv-heads", "1", "--json"]).output
    after = {context: size // tiny.KV_HEADS for context, size in facts["cache_bytes"].items()}
    assert json.loads(planned)["cache_bytes"] == {"before": facts["cache_bytes"], "after": after}
    convert(source, tmp_path / "out", num_key_value_heads=1)
    assert json.loads((tmp_path / "out" / "rehead.json").read_text())["cache_bytes"]["after"] == after
    assert f"| {after['32768']:,} |" in (tmp_path / "out" / "README.md").read_text()
    assert inspect(tmp_path / "out")["cache_bytes"] == after


def test_without_windows_bytes_per_token_say_it_all(tmp_path) -> None:
    source = tiny.save_tiny("llama", tmp_path)
    facts = inspect(source)
    assert facts["windows"] == []
    assert facts["cache_bytes"] == {str(context): context * facts["kv_bytes_per_token"] for context in CONTEXTS}
    assert "tokens" not in CliRunner().invoke(inspect_command, [str(source)]).output.split("KV cache")[1].split("\n")[1]
