"""What each block of keys weighs for some rows: the CPU's and the kernel's figures beside plain scores."""

from __future__ import annotations

import pytest
import torch
from kernel_parity import DEVICE, lengths, needs_kernels

from rehead.attention.block_scores import block_mass
from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall
from rehead.attention.kernels import reference
from rehead.variants.sparse import select

CASES = {
    "whole": (2, 4, 2, 70, 70, 16, {}),
    "behind a cache": (1, 2, 1, 40, 90, 24, {"q_offset": 50}),
    "longer keys than rows": (1, 2, 2, 40, 90, 16, {}),
    "padding": (2, 2, 1, 64, 64, 32, {"kv_start": lengths(0, 37), "kv_end": lengths(64, 50)}),
    "a negative scale": (1, 2, 1, 40, 40, 16, {"scale": -0.3}),
}


def made(name):
    batch, heads, kv_heads, num_q, num_k, dim, rules = CASES[name]
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(batch, num_q, heads, dim, generator=gen).to(DEVICE).transpose(1, 2)
    key = torch.randn(batch, kv_heads, num_k, dim, generator=gen).to(DEVICE) * 2
    return AttentionCall(query, key, key, **rules)


@pytest.mark.parametrize("name", CASES)
def test_shares_are_those_of_the_softmax(name):
    call = made(name)
    batch, heads, num_q, _ = call.query.shape
    num_k, rules = call.key.shape[2], CASES[name][-1]
    rows = torch.randint(num_q, (batch, heads, 21)).int().to(DEVICE)
    keys = call.key.double().repeat_interleave(heads // call.key.shape[1], 1)
    scores = call.query.double() @ keys.transpose(-1, -2) * call.factor
    seen = reference.visible(num_q, num_k, DEVICE, causal=True, **{k: v for k, v in rules.items() if k != "scale"})
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    shares = torch.nn.functional.pad(shares, (0, -num_k % 16)).unflatten(-1, (-1, 16)).sum(-1)
    want = shares.gather(2, rows.long()[..., None].expand(-1, -1, -1, shares.shape[3]))
    torch.testing.assert_close(block_mass(call, rows, 16).double(), want, atol=1e-5, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_choose_what_plain_tensors_choose(name, samples):
    from rehead.attention.kernels.block_choice import ONE, lists_of, settled

    call = made(name)
    batch, heads, num_q, _ = call.query.shape
    rows, owner, _ = select.draw(torch.device(DEVICE), batch, heads, num_q, 16, samples, 0)
    some = rows.shape[2] - owner.shape[2] + 9  # the interpreter is slow
    rows, owner = rows[..., :some].contiguous(), owner[..., :9]
    sizes = {"block": 16, "samples": samples, "first": 1, "local": 0}
    level, moments = select._levels_on_gpu(call, rows, owner, **sizes)
    wanted, losses = select._levels(call, rows, owner, **sizes)
    # Rounding may move a share over the border of a level.
    assert int((level.long() - wanted).abs().max()) <= 1
    assert float((level.long() != wanted).double().mean()) < 0.02
    if torch.equal(level.long(), wanted):
        want = torch.stack([losses.double().sum(0), losses.double().square().sum(0)])
        torch.testing.assert_close(moments.double() / ONE, want, atol=1e-5 * len(losses), rtol=1e-4)
        for allowed, whole in ((0.02, True), (0.3, True), (0.95, False)):
            kept, figures = settled(moments, len(losses), select.LOG, allowed, whole)
            least, wanted = select.settle(losses, allowed, whole)
            assert int(kept) == int(least)
            torch.testing.assert_close(figures.double().cpu(), wanted.double().cpu(), atol=1e-5, rtol=1e-4)
    kept = torch.tensor([select.LEVELS - 40], dtype=torch.int32, device=DEVICE)
    blocks = lists_of(level, kept, 16, level.numel())
    assert torch.equal(blocks.listed(call.key.shape[2]), level >= kept)
    again = KeyBlocks.checked(blocks.starts, blocks.index, num_q, call.key.shape[2], rows=16, keys=16)
    assert torch.equal(again.seen(num_q, call.key.shape[2]), blocks.seen(num_q, call.key.shape[2]))
