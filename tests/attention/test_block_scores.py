"""What each block of keys weighs for some rows: the CPU's and the kernel's figures beside plain scores."""

from __future__ import annotations

import pytest
import torch
from kernel_parity import DEVICE, lengths, needs_kernels

from rehead.attention.block_scores import block_mass
from rehead.attention.call import AttentionCall
from rehead.attention.kernels import reference

CASES = {
    "whole": (2, 4, 2, 70, 70, 16, {}),
    "behind a cache": (1, 2, 1, 40, 90, 24, {"q_offset": 50}),
    "longer keys than rows": (1, 2, 2, 40, 90, 16, {}),
    "padding": (2, 2, 1, 64, 64, 32, {"kv_start": lengths(0, 37), "kv_end": lengths(64, 50)}),
    "a negative scale": (1, 2, 1, 40, 40, 16, {"scale": -0.3}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["plain", pytest.param("kernel", marks=needs_kernels)])
def test_sums_are_those_of_the_scores(path, name):
    batch, heads, kv_heads, num_q, num_k, dim, rules = CASES[name]
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(batch, num_q, heads, dim, generator=gen).to(DEVICE).transpose(1, 2)
    key = torch.randn(batch, kv_heads, num_k, dim, generator=gen).to(DEVICE) * 2
    call = AttentionCall(query, key, key, **rules)
    rows = torch.randint(num_q, (batch, heads, 21), generator=gen).int().sort(-1).values.to(DEVICE)
    scores = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) * call.factor
    seen = reference.visible(num_q, num_k, DEVICE, causal=True, **{k: v for k, v in rules.items() if k != "scale"})
    scores = scores.masked_fill(~seen, float("-inf"))
    shares = torch.nn.functional.pad(scores.softmax(-1).nan_to_num(0.0), (0, -num_k % 16)).unflatten(-1, (-1, 16))
    want = shares.sum(-1).gather(2, rows.long()[..., None].expand(-1, -1, -1, shares.shape[3]))
    if path == "kernel":
        from rehead.attention.kernels import block_sums

        start = rules.get("kv_start", torch.zeros(batch, dtype=torch.int32, device=DEVICE))
        end = rules.get("kv_end", torch.full((batch,), num_k, dtype=torch.int32, device=DEVICE))
        got = block_sums.run(query, key, rows, 16, call.factor, call.offset, start, end)
    else:
        got = block_mass(call, rows, 16)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
