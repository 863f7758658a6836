"""The attention kernels where mistakes hide: bounds on block borders, rows of a batch that differ, odd layouts.

Run like ``test_kernels.py``. The interpreter's blocks have 16 rows and columns, hence the numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_parity import DEVICE, agree, compare, draw, holes, lengths, needs_kernels, run

from rehead.attention.kernels import attention, decode, reference
from rehead.errors import UsageError


def packed(*rows: tuple[int, ...]) -> torch.Tensor:
    """Segment ids [B, S] of rows packed from documents of these lengths."""
    return torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows],
    ).to(DEVICE, torch.int32)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)


# name -> (batch, heads, kv_heads, num_q, num_k, dim, dim_v, rules)
CASES = {
    "window of a block and one": (1, 2, 1, 50, 50, 16, 16, {"causal": True, "window": 17}),
    "window of a block and two": (1, 2, 1, 50, 50, 16, 16, {"causal": True, "window": 18}),
    "chunk of a block": (1, 2, 1, 48, 48, 16, 16, {"causal": True, "chunk": 16}),
    "chunks ahead": (1, 1, 1, 60, 90, 16, 16, {"causal": False, "chunk": 40, "q_offset": 10}),
    "padding on borders": (
        3, 2, 2, 20, 48, 16, 16,
        {"causal": False, "kv_start": lengths(16, 31, 15), "kv_end": lengths(32, 33, 31)},
    ),
    "range beyond the keys": (
        2, 2, 1, 20, 40, 16, 16, {"causal": False, "kv_start": lengths(-20, 3), "kv_end": lengths(80, 41)}
    ),
    "packed, rows differ": (
        2, 2, 1, 40, 64, 16, 16,
        {"causal": True, "q_offset": 24, "q_segments": packed((16, 1, 23), (3, 20, 17)) + 1,
         "kv_segments": packed((20, 20, 1, 23), (24, 3, 20, 17))},
    ),
    "packed, seen both ways": (
        2, 1, 1, 48, 48, 16, 16,
        {"causal": False, "q_segments": packed((32, 16), (1, 47)), "kv_segments": packed((32, 16), (1, 47))},
    ),
    # The first row's last segment has no key: its rows are zero among rows that are not.
    "packed out of order": (
        2, 2, 2, 20, 40, 16, 16,
        {"causal": False, "q_segments": packed((4, 4, 12), (20,)),
         "kv_segments": torch.stack([torch.arange(40) % 2, torch.arange(40) // 16]).to(DEVICE, torch.int32)},
    ),
    "key mask and range": (
        2, 2, 1, 20, 60, 16, 16,
        {"causal": True, "q_offset": 40, "key_mask": holes(2, 60), "kv_start": lengths(25, 3),
         "kv_end": lengths(60, 50)},
    ),
    "bias behind a cache": (
        2, 4, 2, 20, 45, 16, 16, {"causal": True, "q_offset": 25, "bias": noise(2, 4, 20, 45)}
    ),
    "bias, transposed": (
        2, 2, 1, 20, 33, 16, 16, {"causal": False, "bias": noise(2, 2, 33, 20).transpose(2, 3)}
    ),
    "scores far below zero": (1, 2, 1, 20, 33, 16, 16, {"causal": False, "bias": noise(1, 2, 20, 33) - 300}),
    # Rows that are only padding have scores of 0 plus this bias, far beyond what exp2 holds.
    "alibi ahead": (
        1, 2, 1, 20, 70, 16, 16, {"causal": False, "alibi_slopes": torch.tensor([3.0, 0.25], device=DEVICE)}
    ),
    "three heads": (
        2, 3, 1, 21, 21, 16, 40, {"causal": True, "sinks": torch.tensor([0.5, 3.0, -1.0], device=DEVICE)}
    ),
    "sinks above all scores": (
        1, 2, 1, 20, 20, 16, 16, {"causal": True, "sinks": torch.tensor([200.0, -200.0], device=DEVICE)}
    ),
    "a negative scale": (1, 2, 1, 20, 20, 16, 16, {"causal": True, "scale": -0.7}),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    compare(CASES[name], torch.float32)


@needs_kernels
@pytest.mark.parametrize("layout", ["fused", "heads first", "expanded"])
def test_layouts(layout):
    """Query, key, value and the output's gradient need not share strides, nor be contiguous."""
    torch.manual_seed(0)
    batch, heads, seq, dim = 2, 3, 20, 16
    if layout == "fused":
        query, key, value = torch.randn(batch, seq, 3, heads, dim, device=DEVICE).permute(2, 0, 3, 1, 4)
        value = torch.randn(batch, heads, seq + 5, dim, device=DEVICE)[:, :, 5:]
        grad = torch.randn(seq, heads, batch, dim, device=DEVICE).permute(2, 0, 1, 3)
    elif layout == "heads first":
        query = torch.randn(heads, batch, seq, dim, device=DEVICE).transpose(0, 1)
        key, value = torch.randn(2, batch, seq, heads, dim, device=DEVICE)
        key, value = key.transpose(1, 2), value.transpose(1, 2).contiguous()
        grad = torch.randn(batch, heads, seq, 2 * dim, device=DEVICE)[..., ::2].transpose(1, 2)
    else:
        query = torch.randn(1, heads, seq, dim, device=DEVICE).expand(batch, -1, -1, -1)
        key, value = torch.randn(2, batch, 1, seq, dim, device=DEVICE).expand(-1, -1, heads, -1, -1)
        grad = torch.randn(heads, 1, device=DEVICE).expand(batch, seq, heads, dim)
    inputs = tuple(item.detach().requires_grad_() for item in (query, key, value))
    agree(inputs, {"scale": 0.25, "causal": True}, grad)


@needs_kernels
@pytest.mark.parametrize("num_q", [1, 3])
def test_a_cache_of_any_layout(num_q):
    """Keys and values of a cache differ in every stride, and the query is a slice of a fused projection."""
    torch.manual_seed(0)
    query = torch.randn(2, num_q, 6, 16, device=DEVICE).transpose(1, 2)[:, :4]
    key = torch.randn(3, 40, 2, 24, device=DEVICE)[1:, ..., :16].transpose(1, 2)
    value = torch.randn(2, 3, 50, 40, device=DEVICE)[:, 1:, :40, 8:32]
    rules = {"scale": 0.25, "causal": True, "q_offset": 40 - num_q}
    want = reference.attention(query, key, value, **rules)
    torch.testing.assert_close(decode(query, key, value, **rules).double(), want, rtol=1e-5, atol=1e-5)


def among_nan(*shape: int) -> torch.Tensor:
    """Random [B, heads, S, dim] with NaN before and behind every row, sequence and head."""
    batch, heads, seq, dim = shape
    around = torch.full((batch, seq + 40, heads, dim + 16), float("nan"), device=DEVICE)
    inner = around[:, 20 : 20 + seq, :, 8 : 8 + dim]
    return inner.copy_(torch.randn(inner.shape, device=DEVICE)).transpose(1, 2)


@needs_kernels
@pytest.mark.parametrize("rules", [{}, {"softcap": 5.0}, {"bias": None}], ids=["plain", "soft cap", "bias"])
def test_nothing_around_is_read(rules):
    torch.manual_seed(0)
    query, key, value = among_nan(1, 2, 20, 20), among_nan(1, 1, 37, 20), among_nan(1, 1, 37, 24)
    inputs = tuple(item.detach().requires_grad_() for item in (query, key, value))
    if "bias" in rules:
        rules = {"bias": among_nan(1, 2, 20, 37)}
    agree(inputs, {"scale": 0.25, "causal": True, "q_offset": 17, **rules}, among_nan(1, 2, 20, 24).transpose(1, 2))
    for num_q in (1, 3):
        last = query[:, :, :num_q]
        arguments = {"scale": 0.25, "causal": True, "q_offset": 37 - num_q, **rules}
        if "bias" in rules:
            arguments["bias"] = rules["bias"][:, :, :num_q]
        want = reference.attention(last, key, value, **arguments)
        torch.testing.assert_close(decode(last, key, value, **arguments).double(), want, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", ["gqa", "sinks and soft cap"])
def test_half_precision_has_float32_sums(case):
    """Closer than the grid's bound: statistics or sums in half precision would show."""
    bound = 6e-4 if DEVICE == "cpu" else 2e-3  # tensor cores add in another order
    rules = {"softcap": 5.0, "sinks": torch.tensor([0.5, -1.0], device=DEVICE)} if case != "gqa" else {}
    torch.manual_seed(0)
    inputs, rules, grad = draw((1, 2, 1, 40, 100, 32, 32, {"causal": True, "q_offset": 60, **rules}), torch.float16)
    got, want = (run(function, inputs, rules, grad) for function in (attention, reference.attention))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < bound, f"{name}: relative error {error:.2e}"


@needs_kernels
@pytest.mark.parametrize("rules", [{}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05, 0.4, 0.3], device=DEVICE)}])
def test_a_group_in_parts(rules, monkeypatch):
    """Where few programs would run, the query heads of a group are split and their gradients added up."""
    from rehead.attention.kernels import general

    monkeypatch.setattr(general, "key_splits", lambda programs, group, wanted: 3)
    compare((2, 6, 1, 20, 20, 16, 16, {"causal": True, **rules}), torch.float32, deterministic=True)


@needs_kernels
def test_row_delta_clears_a_buffer_and_no_more():
    from rehead.attention.kernels import general

    out, grad = torch.randn(2, 2, 21, 3, 16, device=DEVICE)
    around = torch.full((2, 3, 2 * 32, 16), 7.0, device=DEVICE)
    buffer = around.view(-1)[: 2 * 3 * 32 * 16].view(2, 3, 32, 16)
    delta = general.row_delta(out, grad, clear=buffer)
    torch.testing.assert_close(delta, (out * grad).sum(-1).transpose(1, 2))
    assert (buffer == 0).all()
    assert (around.view(-1)[buffer.numel() :] == 7).all()


@needs_kernels
@pytest.mark.parametrize("num_q", [1, 20])
def test_values_per_head_need_not_be_contiguous(num_q):
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, num_q, 16, device=DEVICE), torch.randn(1, 2, 40, 16, device=DEVICE)
    sinks, slopes = torch.tensor([[0.5, 0.5], [3.0, 0.25], [-1.0, 0.1], [1.0, 0.06]], device=DEVICE).unbind(1)
    rules = {"scale": 0.25, "causal": True, "q_offset": 40 - num_q, "sinks": sinks, "alibi_slopes": slopes}
    want = reference.attention(query, key, key, **rules)
    function = decode if num_q == 1 else attention
    torch.testing.assert_close(function(query, key, key, **rules).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("function", [attention, decode])
def test_a_mask_that_is_not_bool_is_refused(function, dtype):
    """Read byte by byte, it would hide the wrong keys."""
    query = torch.randn(1, 2, 4, 16, device=DEVICE)
    with pytest.raises(UsageError, match=r"key_mask has dtype torch\.\w+; it must be bool"):
        function(query, query, query, scale=1.0, causal=True, key_mask=torch.ones(1, 4, dtype=dtype, device=DEVICE))


@needs_kernels
@pytest.mark.parametrize("name", ["left padding", "packed", "a logit as well"])
def test_sink_tokens_by_log_sum_exps(name, monkeypatch):
    """A window and the first tokens beside it are two calls of the kernels, merged; gradients go through both."""
    from rehead.attention import attend as front
    from rehead.attention import kernels
    from rehead.attention.call import AttentionCall

    labels = torch.tensor([[0] * 17 + [1] * 28], dtype=torch.int32, device=DEVICE).expand(2, -1)
    rules = {
        "left padding": {"kv_start": torch.tensor([0, 13], device=DEVICE)},
        "packed": {"q_segments": labels, "kv_segments": labels},
        "a logit as well": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], device=DEVICE)},
    }[name]
    rules = {**rules, "window": 9, "sink_tokens": 3, "scale": 0.3}

    def natural(call):
        out, lse = kernels.run(call)
        return out, (lse * math.log(2)).masked_fill(lse == float("inf"), float("-inf"))

    monkeypatch.setattr(front.cpu, "run", natural)
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 45, 16), (2, 2, 45, 16), (2, 2, 45, 24))
    tensors = [torch.randn(shape, generator=gen).to(DEVICE).requires_grad_() for shape in shapes]
    got = front.attend(AttentionCall(*tensors, **rules))
    want = reference.attention(*tensors, causal=True, **rules)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    weights = torch.randn(got.shape, generator=gen).to(DEVICE)
    grads = torch.autograd.grad((got * weights).sum(), tensors)
    wanted = torch.autograd.grad((want * weights).sum(), tensors)
    for grad, other in zip(grads, wanted):
        torch.testing.assert_close(grad, other, atol=5e-5, rtol=1e-3)
