"""The attention kernels against plain float64 attention: a few shapes in Triton's interpreter, the whole grid on a GPU.

Without a GPU the tests run in Triton's interpreter, which wants TRITON_INTERPRET=1 before Triton is imported:
``test_kernels_interpreter.py`` runs them so, in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from kernel_parity import (
    DEVICE,
    GPU,
    HAS_TRITON,
    compare,
    draw,
    holes,
    lengths,
    needs_kernels,
    run,
    segments,
    some_blocks,
)

from rehead.attention.call import CALL, AttentionCall
from rehead.attention.kernels import attention, reference, slow_path, supported
from rehead.errors import UnsupportedError, UsageError

# name -> (batch, heads, kv_heads, num_q, num_k, dim, dim_v, rules)
CASES = {
    "full": (2, 2, 2, 37, 41, 32, 32, {"causal": False}),
    "causal": (2, 2, 2, 50, 50, 32, 32, {"causal": True}),
    "gqa": (1, 6, 2, 40, 40, 64, 64, {"causal": True}),
    "mqa": (2, 4, 1, 33, 33, 16, 16, {"causal": True}),
    "chunked prefill": (1, 2, 1, 20, 53, 32, 32, {"causal": True, "q_offset": 33}),
    "static cache": (1, 2, 1, 24, 60, 32, 32, {"causal": True, "q_offset": 0}),
    "odd head_dim": (1, 2, 2, 35, 35, 40, 24, {"causal": True}),
    "window": (2, 2, 1, 70, 70, 32, 32, {"causal": True, "window": 19}),
    "window with cache": (1, 2, 1, 18, 66, 32, 32, {"causal": True, "window": 21, "q_offset": 48}),
    "one-sided window": (1, 2, 2, 40, 40, 32, 32, {"causal": False, "window": 9}),
    "chunk": (1, 2, 1, 66, 66, 32, 32, {"causal": True, "chunk": 23}),
    "chunk with cache": (1, 2, 1, 20, 66, 32, 32, {"causal": True, "chunk": 23, "q_offset": 40}),
    "left padding": (2, 2, 1, 45, 45, 32, 32, {"causal": True, "kv_start": lengths(0, 17)}),
    "right padding": (2, 2, 1, 45, 45, 32, 32, {"causal": True, "kv_end": lengths(45, 20)}),
    "both ends": (2, 2, 2, 45, 45, 32, 32, {"causal": False, "kv_start": lengths(5, 30), "kv_end": lengths(9, 44)}),
    "no visible key": (
        2,
        2,
        1,
        20,
        20,
        32,
        32,
        {"causal": True, "kv_start": lengths(0, 20), "kv_end": lengths(20, 20)},
    ),
    "key mask": (2, 2, 1, 44, 44, 32, 32, {"causal": True, "key_mask": holes(2, 44)}),
    "packed": (
        2,
        4,
        2,
        60,
        60,
        32,
        32,
        {"causal": True, "q_segments": segments([11, 30, 19], 2), "kv_segments": segments([11, 30, 19], 2)},
    ),
    "packed, window": (
        1,
        2,
        2,
        60,
        60,
        32,
        32,
        {"causal": True, "window": 8, "q_segments": segments([25, 35], 1), "kv_segments": segments([25, 35], 1)},
    ),
    "soft cap": (1, 2, 1, 40, 40, 32, 32, {"causal": True, "softcap": 5.0}),
    "alibi": (
        1,
        4,
        2,
        40,
        40,
        32,
        32,
        {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.06], device=DEVICE)},
    ),
    "sinks": (2, 4, 2, 40, 40, 32, 32, {"causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)}),
    "sinks, window, padding": (
        2,
        2,
        1,
        40,
        40,
        32,
        32,
        {"causal": True, "window": 7, "kv_start": lengths(0, 12), "sinks": torch.tensor([0.5, 1.0], device=DEVICE)},
    ),
    "float bias": (
        2,
        2,
        1,
        30,
        34,
        32,
        32,
        {"causal": False, "bias": torch.linspace(-2, 2, 2 * 30 * 34, device=DEVICE).view(1, 2, 30, 34)},
    ),
    "bool bias": (
        2,
        2,
        1,
        30,
        34,
        32,
        32,
        {"causal": False, "bias": (torch.arange(2 * 30 * 34, device=DEVICE) % 3 > 0).view(2, 1, 30, 34)},
    ),
    "first tokens": (2, 4, 2, 70, 70, 32, 32, {"causal": True, "window": 19, "sink_tokens": 4}),
    "first tokens, padding, cache": (
        2,
        2,
        1,
        20,
        90,
        16,
        16,
        {"causal": True, "window": 9, "sink_tokens": 17, "q_offset": 70, "kv_start": lengths(0, 23)},
    ),
    "first tokens behind a mask": (
        2,
        2,
        1,
        60,
        60,
        16,
        16,
        {"causal": True, "window": 9, "sink_tokens": 3, "key_mask": holes(2, 60)},
    ),
    "blocks": (2, 4, 2, 70, 70, 32, 32, {"causal": True, "blocks": some_blocks(2, 4, 70, 70)}),
    "blocks for all heads": (2, 4, 2, 70, 70, 16, 16, {"causal": False, "blocks": some_blocks(1, 1, 70, 70)}),
    "large blocks, ranges": (
        2,
        2,
        1,
        70,
        100,
        16,
        16,
        {
            "causal": True,
            "q_offset": 30,
            "kv_start": lengths(0, 40),
            "kv_end": lengths(90, 100),
            "blocks": some_blocks(1, 2, 70, 100, 32, 64),
        },
    ),
    "blocks and every other rule": (
        2,
        4,
        2,
        50,
        66,
        16,
        24,
        {
            "causal": True,
            "q_offset": 16,
            "window": 30,
            "sink_tokens": 5,
            "softcap": 4.0,
            "key_mask": holes(2, 66),
            "blocks": some_blocks(2, 1, 50, 66),
        },
    ),
    "everything": (
        2,
        4,
        2,
        50,
        66,
        32,
        48,
        {
            "causal": True,
            "q_offset": 16,
            "window": 30,
            "softcap": 4.0,
            "key_mask": holes(2, 66),
            "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE),
            "sinks": torch.tensor([0.1, -0.2, 0.3, 1.0], device=DEVICE),
        },
    ),
}
GPU_CASES = {
    "long causal 64": (2, 4, 4, 1000, 1000, 64, 64, {"causal": True}),
    "long causal 128": (2, 4, 2, 1024, 1024, 128, 128, {"causal": True}),
    "long full 128": (1, 4, 1, 777, 900, 128, 128, {"causal": False}),
    "long window 128": (1, 4, 2, 1500, 1500, 128, 128, {"causal": True, "window": 300}),
    "long window 64": (1, 4, 2, 1500, 1500, 64, 64, {"causal": True, "window": 129}),
    "long cache 128": (2, 8, 2, 300, 1300, 128, 128, {"causal": True, "q_offset": 1000}),
    "long cache, unaligned": (1, 2, 2, 300, 1300, 64, 64, {"causal": True, "q_offset": 777}),
    "long padding 128": (
        3,
        4,
        2,
        600,
        600,
        128,
        128,
        {"causal": True, "kv_start": lengths(0, 250, 599), "kv_end": lengths(600, 600, 600)},
    ),
    "long right padding 64": (2, 4, 2, 600, 600, 64, 64, {"causal": True, "kv_end": lengths(600, 130)}),
    "long sinks 64": (
        2,
        4,
        2,
        600,
        600,
        64,
        64,
        {"causal": True, "window": 128, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)},
    ),
    "long sinks 128": (
        1,
        4,
        2,
        500,
        500,
        128,
        128,
        {"causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)},
    ),
    "head_dim 80": (1, 4, 4, 500, 500, 80, 80, {"causal": True}),
    "head_dim 96": (1, 4, 2, 500, 500, 96, 96, {"causal": True}),
    "head_dim 192, 128": (1, 2, 2, 400, 400, 192, 128, {"causal": True}),
    "head_dim 256": (1, 2, 1, 400, 400, 256, 256, {"causal": True, "softcap": 30.0}),
    "long packed": (
        1,
        4,
        2,
        1024,
        1024,
        128,
        128,
        {"causal": True, "q_segments": segments([300, 24, 700], 1), "kv_segments": segments([300, 24, 700], 1)},
    ),
    "long first tokens 128": (2, 8, 2, 1500, 1500, 128, 128, {"causal": True, "window": 200, "sink_tokens": 4}),
    "long first tokens 64": (
        3,
        4,
        2,
        900,
        1400,
        64,
        64,
        {"causal": True, "window": 333, "sink_tokens": 33, "q_offset": 500, "kv_start": lengths(0, 131, 700)},
    ),
    "long blocks 64": (
        2,
        6,
        2,
        1500,
        1500,
        64,
        64,
        {"causal": True, "blocks": some_blocks(2, 6, 1500, 1500, 128, 128)},
    ),
    "long blocks 128": (
        2,
        4,
        2,
        1100,
        1500,
        128,
        128,
        {
            "causal": True,
            "q_offset": 400,
            "kv_start": lengths(0, 200),
            "blocks": some_blocks(1, 4, 1100, 1500, 256, 128),
        },
    ),
    "mqa 128": (1, 16, 1, 512, 512, 128, 128, {"causal": True}),
}


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
