"""Autocast: the patched model rounds as little as the unpatched one, forward and backward, with float32 weights."""

import pytest
import torch
from probes import TOKENS

from rehead.attention.attend import attention
from rehead.benchmarks.tiny import tiny_model
from rehead.patches import patch_model

TYPES = ["llama", "gemma2", "gpt_neox", "falcon", "bloom", "gptj", "deepseek_v3", "roformer"]


def _step(model):
    """Logits and gradients of one training step without a cache."""
    out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    weights = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    grads = torch.autograd.grad(out.loss, weights, allow_unused=True)
    return [out.logits.detach().float(), *(g.float() for g in grads if g is not None)]


def _error(step, reference):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(step, reference, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_training_under_autocast_is_as_close_to_float32_as_unpatched(model_type, dtype):
    model = tiny_model(model_type)
    reference = _step(model)
    with torch.autocast("cpu", dtype=dtype):
        sdpa = _step(model)
        with patch_model(model, "tiled"):
            mine = _step(model)
    assert _error(mine, reference) <= 1.25 * _error(sdpa, reference)


def test_float32_queries_beside_values_in_sixteen_bits():
    """What rotary positions leave behind under autocast; float64 stays what it is."""
    query, key = torch.randn(2, 1, 4, 9, 16)
    value = torch.randn(1, 4, 9, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(query, key, value, causal=True)
        assert attention(query.double(), key.double(), value.double(), causal=True).dtype == torch.float64
    expected = attention(query.bfloat16(), key.bfloat16(), value, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_scores_of_a_tile_stay_in_float32_under_autocast():
    query, key, value = (torch.randn(1, 2, 64, 16).bfloat16() for _ in range(3))
    expected = attention(query, key, value, causal=True, softcap=20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(query, key, value, causal=True, softcap=20.0), expected)


def test_autocast_compiles_in_one_graph():
    model, inputs = tiny_model("llama"), {"attention_mask": torch.ones_like(TOKENS), "use_cache": False}
    with patch_model(model, "tiled"), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(TOKENS, **inputs).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS, **inputs).logits, expected, atol=5e-2, rtol=0)
