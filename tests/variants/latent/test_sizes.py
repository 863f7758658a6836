"""Costs counted before a conversion."""

from __future__ import annotations

import pytest
import torch

from rehead.errors import UsageError
from rehead.variants.latent.pairs import undecided
from rehead.variants.latent.sizes import LatentSizes, rank_for, splits

SIZES = LatentSizes(width=48, num_heads=6, rank=20, rope_dim=8, nope_dim=12, value_dim=10)


def test_parameters_and_cache_are_those_of_the_stock_class() -> None:
    from transformers import YoutuConfig
    from transformers.models.youtu.modeling_youtu import YoutuAttention

    config = YoutuConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=6,
        kv_lora_rank=20,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
    )
    assert SIZES.parameters == sum(p.numel() for p in YoutuAttention(config, 0).parameters())
    assert SIZES.numbers_per_token == 28


def test_absorbing_pays_where_the_context_is_long() -> None:
    assert SIZES.decode_flops(0) == SIZES.decode_flops(1) - 2 * 6 * (2 * 20 + 8)
    assert SIZES.decode_flops(1, absorbed=False) < SIZES.decode_flops(1)
    assert SIZES.decode_flops(1000) < 0.2 * SIZES.decode_flops(1000, absorbed=False)


def test_a_cache_is_split_between_pairs_and_latent() -> None:
    assert rank_for(128, 16) == 96
    with pytest.raises(UsageError, match="give 34 or more"):
        rank_for(32, 16)
    assert splits(128, 16, 32) == [(16, 96), (20, 88), (24, 80), (32, 64)]
    assert splits(100, 16, 32) == [(16, 68), (20, 60), (24, 52)]
    assert splits(40, 16, 32) == []
    assert splits(256, 32, 32) == [(32, 192)]


def test_pairs_that_the_text_is_too_short_to_judge_are_named() -> None:
    angles = 100000.0 ** (-torch.arange(32).double() / 32)
    short, long = (undecided(angles, torch.arange(16), length, 8192) for length in (64, 2048))
    assert set(long) < set(short)
    assert 16 in short
    assert 16 not in long
    assert undecided(angles, torch.arange(16), 8192, 8192) == []
    assert undecided(angles, torch.arange(32), 64, 8192) == []
