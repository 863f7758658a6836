"""The far field in closed form: right for keys that are normally distributed, and only where it helps."""

import pytest
import torch

from rehead.attention.attend import attend as dense
from rehead.attention.attend import attend_with_lse
from rehead.attention.call import AttentionCall
from rehead.variants.far import FarOptions, attend
from rehead.variants.far.gaussian import far_field

LENGTH, DIM = 2048, 8


def drawn(seed=0, heads=4, kv_heads=2, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, n, LENGTH, DIM, generator=gen, dtype=dtype) for n in (heads, kv_heads, kv_heads)
    )
    return query, 0.6 * key + 0.5, value + 0.7 * key.roll(1, -1)


def test_many_normal_keys_are_their_gaussian():
    query, key, value = drawn()
    call = AttentionCall(query[:, :, -64:], key, value, q_offset=LENGTH - 64)
    out, lse = far_field(call, 1, torch.tensor([31]), 64)
    want, wanted = attend_with_lse(
        call.with_(causal=False, kv_start=torch.tensor([64]), kv_end=torch.tensor([31 * 64]))
    )
    assert float((lse - wanted).abs().max()) < 0.1
    assert float((out - want).norm() / want.norm()) < 0.2
    mean = value[:, :, 64 : 31 * 64].mean(2).repeat_interleave(2, 1)[:, None]
    assert float((out - want).norm()) < 0.4 * float((mean - want).norm())


def test_keys_that_are_one_key_are_exact_and_gradients_pass():
    """Without spread the closed form is no approximation; every block of rows has its own keys."""
    query, key, value = drawn()
    key = key[:, :, :1].expand(-1, -1, LENGTH, -1).clone().requires_grad_()
    call = AttentionCall(query.requires_grad_(), key, value.requires_grad_())
    end = torch.arange(LENGTH // 64) - 3
    out, lse = far_field(call, 1, end.clamp(min=1), 64)
    for block in (3, 4, 5, 20, 31):
        rows = slice(block * 64, block * 64 + 64)
        if end[block] <= 1:
            assert bool((lse[:, :, rows] == float("-inf")).all())
            assert bool((out[:, rows] == 0).all())
            continue
        part = AttentionCall(query[:, :, rows], key, value, causal=False).with_(
            kv_start=torch.tensor([64]), kv_end=torch.tensor([int(end[block]) * 64])
        )
        want, wanted = attend_with_lse(part)
        torch.testing.assert_close(out[:, rows], want)
        torch.testing.assert_close(lse[:, :, rows], wanted)
    (out.sum() + lse[lse > float("-inf")].sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in (query, key, value))


@pytest.mark.parametrize("offset", [0, 640, 613])
def test_each_key_is_near_or_far_and_not_both(offset):
    """With keys that are one key, window and Gaussian together are the dense attention."""
    query, key, value = drawn()
    key = key[:, :, :1].expand(-1, -1, LENGTH, -1)
    options = FarOptions(size=100, block=64, heads="all")
    call = AttentionCall(query[:, :, offset:], key, value, q_offset=offset, sinks=torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(attend(call, options, {}, dense), dense(call))
    alone = attend(call, options.but(heads="none"), {}, dense)
    assert float((alone - dense(call)).abs().max()) > 0.01


def test_heads_are_chosen_by_what_they_gain():
    query, key, value = drawn()
    # The second KV head's keys are far from normal: one of 64 is what all rows look for.
    key[:, 1, 30::64, 0] = 9.0
    query[:, 2:, :, 0] = 6.0
    call = AttentionCall(query, key, value)
    options = FarOptions(size=128, block=64)
    near, both, chosen = (attend(call, options.but(heads=heads), {}, dense) for heads in ("none", "all", "auto"))
    exact = dense(call)
    late = slice(LENGTH // 2, None)

    def errors(part):
        return (part - exact)[:, late].square().sum((0, 1, 3))

    best = torch.minimum(errors(near), errors(both))
    torch.testing.assert_close(errors(chosen), best)
    assert bool((errors(both) < errors(near))[:2].all())


def test_other_calls_pass_unchanged():
    query, key, value = drawn()
    options = FarOptions(size=128, block=64)
    step = AttentionCall(query[:, :, -1:], key, value, q_offset=LENGTH - 1)
    short = AttentionCall(query[:, :, :192], key[:, :, :192], value[:, :, :192])
    for call in (step, short, AttentionCall(query, key, value, window=50)):
        assert torch.equal(attend(call, options, {}, dense), dense(call))
