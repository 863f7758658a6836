"""A longer context without rotary frequencies: tables of positions, sinusoids, biases by distance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import loaded, logits
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from rehead.convert import convert, verify
from rehead.variants.context.tables import longer

LONG = torch.randint(8, 90, (1, 160), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("kind", "key", "table", "offset"), [
    ("gpt2", "n_positions", "transformer.wpe.weight", 0), ("opt", "max_position_embeddings", "embed_positions", 2),
    ("biogpt", "max_position_embeddings", "embed_positions", 2), ("gpt_neo", "max_position_embeddings", "wpe", 0),
])  # fmt: skip
@pytest.mark.parametrize("how", ["interpolate", "repeat"])
def test_tables_grow(kind: str, key: str, table: str, offset: int, how: str, tmp_path: Path) -> None:
    source = tiny.save_tiny(kind, tmp_path / "source")
    convert(source, tmp_path / "out", variants=[f"context:tokens=256,table={how}"])
    verify(tmp_path / "out", str(source))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    name = next(name for name in before if table in name)
    assert after[name].shape[0] == 256 + offset
    assert torch.equal(after[name][:offset], before[name][:offset])
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == 256
    assert torch.equal(logits(loaded(source)), logits(loaded(tmp_path / "out"))) == (how == "repeat")
    with torch.no_grad():
        assert loaded(tmp_path / "out")(LONG).logits.isfinite().all()


def test_sinusoids_are_computed_anew_and_biases_reach_further(tmp_path: Path) -> None:
    source = tiny.save_tiny("xglm", tmp_path / "source")
    out = convert(source, tmp_path / "out", context=256).out
    assert torch.equal(logits(loaded(source)), logits(loaded(out)))
    assert loaded(out)(LONG).logits.isfinite().all()


@given(st.integers(2, 40), st.integers(2, 200))
@settings(max_examples=40, deadline=None)
def test_interpolated_tables_keep_their_ends_and_lines(rows: int, positions: int) -> None:
    table = torch.linspace(0, 1, rows)[:, None] * torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(longer(table, positions), torch.linspace(0, 1, positions)[:, None] * table[-1])
    assert torch.equal(longer(table, positions, how="repeat")[:rows], table[:positions])


@pytest.mark.parametrize("form", ["t5", "rehead_t5"])
def test_biases_by_distance_reach_as_much_further(form: str, tmp_path: Path) -> None:
    """T5's buckets: distances four times as large share the bucket, and so the bias, of the old ones."""
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, n_positions=64,
                      relative_attention_num_buckets=16, relative_attention_max_distance=64)  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration._from_config(config).save_pretrained(tmp_path / "source")
    source = tmp_path / "source"
    if form == "rehead_t5":
        source = convert(source, tmp_path / "pooled", num_key_value_heads=2).out
    convert(source, tmp_path / "out", context=256)
    verify(tmp_path / "out", str(source))
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "out"))
    assert (after.config.model_type, after.config.relative_attention_max_distance) == (form, 256)
    bias = before.encoder.block[0].layer[0].SelfAttention, after.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        old, new = bias[0].compute_bias(80, 80), bias[1].compute_bias(320, 320)
        assert torch.equal(new[..., :5, :5], old[..., :5, :5])  # near distances have buckets of their own
        # Beyond the old reach all distances were one; now they are told apart as far as the new one.
        assert torch.equal(old[..., 0, 64], old[..., 0, 79])
        assert not torch.equal(new[..., 0, 64], new[..., 0, 200])
        assert torch.equal(new[..., 0, 256], new[..., 0, 319])
        ids = torch.arange(200)[None] % 90 + 2
        assert after(input_ids=ids, decoder_input_ids=ids[:, :8]).logits.isfinite().all()
