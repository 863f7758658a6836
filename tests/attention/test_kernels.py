"""The attention kernels against plain float64 attention: a few shapes in Triton's interpreter, the whole grid on a GPU.

Without a GPU the tests run in Triton's interpreter, which wants TRITON_INTERPRET=1 before Triton is imported:
``test_kernels_interpreter.py`` runs them so, in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, GPU_CASES
from kernel_parity import DEVICE, GPU, HAS_TRITON, compare, draw, needs_kernels, run

from rehead.attention.call import CALL, AttentionCall
from rehead.attention.kernels import attention, reference, slow_path, supported
from rehead.errors import UnsupportedError, UsageError


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    compare(CASES[name], torch.float32)


@needs_kernels
@pytest.mark.parametrize("name", ["causal", "left padding"])
def test_deterministic_matches_too(name):
    compare(CASES[name], torch.float32, deterministic=True)


@needs_kernels
def test_masked_keys_weigh_nothing():
    """Multiplying scores by a mask of zeros and ones, as it is often written, would leave them the weight e^0."""
    (query, key, value), rules, _ = draw(CASES["blocks"], torch.float32)
    seen = reference.visible(70, 70, DEVICE, **{name: rules[name] for name in ("causal", "blocks")})
    hidden = ~seen[:, ::2] & ~seen[:, 1::2]  # from both query heads of a KV head
    row = int(hidden[0, 0].sum(-1).argmax())
    worse = [item.detach().clone() for item in (key, value)]
    for item in worse:
        item[0, 0, hidden[0, 0, row]] = 1e4
    before, after = attention(query, key, value, **rules), attention(query, *worse, **rules)
    assert torch.equal(before[0, row, :2], after[0, row, :2])


@needs_kernels
def test_rows_without_keys_are_zero():
    inputs, rules, _ = draw(CASES["no visible key"], torch.float32)
    out = attention(*inputs, **rules)
    assert (out[1] == 0).all()
    assert (out[0, 1:] != 0).any()


@needs_kernels
def test_future_tokens_do_not_leak():
    inputs, rules, _ = draw(CASES["causal"], torch.float32)
    before = attention(*inputs, **rules)
    changed = [item.detach().clone() for item in inputs]
    for item in changed[1:]:
        item[:, :, 30:] = torch.randn_like(item[:, :, 30:]) * 10
    after = attention(inputs[0], *changed[1:], **rules)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@needs_kernels
def test_output_is_contiguous_in_transformers_layout():
    inputs, rules, _ = draw(CASES["gqa"], torch.float32)
    out = attention(*inputs, **rules)
    assert out.shape == (1, 40, 6, 64)
    assert out.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("name", ["gqa", "sinks"])
def test_the_operator_passes_torch_opcheck(name):
    from rehead.attention.kernels import ops

    inputs, rules, _ = draw(CASES[name], torch.float32)
    torch.library.opcheck(
        ops.attention_forward,
        tuple(CALL.flatten(AttentionCall(*inputs, **rules))),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [*CASES, *GPU_CASES])
def test_parity_in_half_precision(name, dtype):
    compare((CASES | GPU_CASES)[name], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", GPU_CASES)
def test_parity_of_long_inputs_in_float32(name):
    compare(GPU_CASES[name], torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_deterministic_backward_repeats_bit_for_bit():
    inputs, rules, grad = draw(GPU_CASES["long causal 128"], torch.bfloat16)
    first = run(attention, inputs, rules | {"deterministic": True}, grad)
    for _ in range(3):
        again = run(attention, inputs, rules | {"deterministic": True}, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
def test_error_is_within_a_tenth_of_flash(dim):
    torch.manual_seed(1)
    inputs, rules, grad = draw((2, 4, 4, 2048, 2048, dim, dim, {"causal": True}), torch.bfloat16)
    want = run(reference.attention, [item.detach().double().requires_grad_() for item in inputs], rules, grad)
    got = run(attention, inputs, rules, grad)

    def flash(query, key, value, *, scale, causal):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
        return out.transpose(1, 2)

    theirs = run(flash, inputs, rules, grad)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, theirs, want):
        ours, flashs = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        assert ours <= 1.1 * flashs, f"{name}: {ours:.3e} against {flashs:.3e}"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_compiles_without_a_graph_break():
    inputs, rules, grad = draw(GPU_CASES["long causal 128"], torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, **rules) * 2, fullgraph=True)
    eager = run(lambda q, k, v, **_: attention(q, k, v, **rules) * 2, inputs, rules | {"deterministic": True}, grad)
    traced = run(lambda q, k, v, **_: compiled(q, k, v), inputs, rules, grad)
    for a, b in zip(eager, traced):
        assert torch.allclose(a.float(), b.float(), atol=2e-2, rtol=2e-2)


def test_bad_arguments_name_the_remedy():
    query, key = torch.randn(1, 6, 4, 8), torch.randn(1, 4, 4, 8)
    with pytest.raises(UsageError, match="6 query heads cannot share 4 KV heads"):
        attention(query, key, key, scale=1.0, causal=True)
    with pytest.raises(UsageError, match="window is 0"):
        attention(query, query, query, scale=1.0, causal=True, window=0)
    with pytest.raises(UsageError, match="q_segments and kv_segments go together"):
        attention(query, query, query, scale=1.0, causal=True, q_segments=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(UsageError, match="sinks has shape 3"):
        attention(query, query, query, scale=1.0, causal=True, sinks=torch.zeros(3))


def test_what_cannot_run_says_why(monkeypatch):
    meta = torch.randn(1, 2, 4, 8, device="meta")
    reason = supported(meta, meta, meta, scale=1.0, causal=True)
    assert reason is not None
    if HAS_TRITON:
        assert "meta" in reason
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        plain = torch.randn(1, 2, 4, 8)
        wide = torch.randn(1, 2, 4, 320)
        assert "head_dim 320" in supported(wide, wide, wide, scale=1.0, causal=True)
        assert "float64" in supported(*[plain.double()] * 3, scale=1.0, causal=True)
    with pytest.raises(UnsupportedError, match="use attn_implementation='sdpa'"):
        attention(meta, meta, meta, scale=1.0, causal=True)


@needs_kernels
def test_the_slow_path_has_a_reason():
    plain = torch.randn(1, 2, 40, 32, device=DEVICE)
    assert slow_path(plain, plain, plain, scale=1.0, causal=True) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "name",
    [
        "long causal 64",
        "long window 128",
        "long padding 128",
        "long sinks 64",
        "head_dim 80",
        "long first tokens 64",
        "long first tokens 128",
        "long blocks 64",
        "long blocks 128",
    ],
)
def test_hopper_takes_the_common_calls(name):
    inputs, rules, _ = draw(GPU_CASES[name], torch.bfloat16)
    assert slow_path(*inputs, **rules) is None
    assert "soft cap" in slow_path(*inputs, **rules | {"softcap": 3.0})
