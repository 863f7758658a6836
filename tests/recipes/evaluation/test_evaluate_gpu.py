"""The same figures from a GPU."""

from __future__ import annotations

import pytest
import torch

from rehead.recipes import evaluate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_finds_what_a_cpu_finds(original, converted, text):
    options = {
        "baseline": str(original), "data": [str(text)], "window": 64, "tokens": 1024, "dtype": "float32",
        "conventions": ("disjoint", "strided", "rolling"), "damage": True, "damage_tokens": 256, "needle": (48,),
        "speed": True, "speed_batch": (1, 4), "speed_context": (64,), "speed_repeats": 2,
    }  # fmt: skip
    here, there = (evaluate(str(converted), device=device, **options) for device in ("cpu", "cuda"))
    for ours, theirs in zip(here.divergence + here.damage, there.divergence + there.damage):
        assert getattr(ours, "mean", getattr(ours, "kl", None)) == pytest.approx(
            getattr(theirs, "mean", getattr(theirs, "kl", None)), rel=2e-3
        )
    assert [row.value for row in here.perplexity] == pytest.approx([row.value for row in there.perplexity], rel=1e-3)
    assert here.model.kv_bytes_per_token == there.model.kv_bytes_per_token
    assert all(row.peak_memory_bytes > 0 for row in there.speed)
    itself = evaluate(str(converted), baseline=str(converted), data=[str(text)], window=64, tokens=1024, device="cuda")
    assert itself.divergence[0].max == 0
