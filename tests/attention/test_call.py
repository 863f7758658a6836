"""One record of a call: windows with sink tokens, log-sum-exps and their gradients, and the operators' signatures."""

import math

import pytest
import torch

from rehead.attention.attend import attend, attend_with_lse, merge
from rehead.attention.call import CALL, AttentionCall
from rehead.attention.kernels import reference
from rehead.errors import UnsupportedError

LEFT = torch.tensor([[False] * 5 + [True] * 25, [True] * 30])
SEGMENTS = torch.tensor([[0] * 12 + [1] * 18, [3] * 7 + [1] * 9 + [2] * 14], dtype=torch.int32)
RULES = {
    "plain": {},
    "left padding as bounds": {"kv_start": torch.tensor([5, 0])},
    "padding as a mask": {"key_mask": LEFT},
    "a range": {"kv_start": torch.tensor([3, 0]), "kv_end": torch.tensor([28, 20])},
    "packed": {"q_segments": SEGMENTS, "kv_segments": SEGMENTS},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "soft cap": {"softcap": 3.0},
    "a logit as well": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "a bias": {"bias": torch.linspace(-1, 1, 900).view(1, 1, 30, 30)},
    "a chunk": {"chunk": 13},
}


def inputs(rows=30, keys=30, dim=8, value_dim=8, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 4, rows, dim), (2, 2, keys, dim), (2, 2, keys, value_dim))
    return [torch.randn(shape, generator=gen, dtype=dtype) for shape in shapes]


def doubled(rules):
    return {
        name: rule.double() if isinstance(rule, torch.Tensor) and rule.is_floating_point() else rule
        for name, rule in rules.items()
    }


def gradients(function, tensors, *shape):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("name", RULES)
def test_a_window_with_sink_tokens_is_the_definition(name):
    rules = {**doubled(RULES[name]), "window": 6, "sink_tokens": 3}
    for value_dim in (8, 5):
        tensors = inputs(value_dim=value_dim)
        got, grads = gradients(lambda q, k, v: attend(AttentionCall(q, k, v, **rules)), tensors)
        want, wanted = gradients(
            lambda q, k, v: reference.attention(q, k, v, scale=8**-0.5, causal=True, **rules), tensors
        )
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
        for grad, other in zip(grads, wanted):
            torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["plain", "left padding as bounds", "padding as a mask", "packed", "a logit as well"])
def test_decoding_with_sink_tokens_is_the_last_rows(name):
    rules = {**doubled(RULES[name]), "window": 6, "sink_tokens": 3}
    query, key, value = inputs()
    whole = attend(AttentionCall(query, key, value, **rules))
    for count in (1, 4):
        last = {**rules, "q_offset": 30 - count}
        if "q_segments" in last:
            last["q_segments"] = last["q_segments"][:, -count:]
        step = attend(AttentionCall(query[:, :, -count:], key, value, **last))
        torch.testing.assert_close(step, whole[:, -count:], atol=1e-10, rtol=1e-8)


def test_sinks_that_cover_everything_are_no_window():
    query, key, value = inputs()
    plain = attend(AttentionCall(query, key, value))
    for sizes in ({"window": 2, "sink_tokens": 30}, {"window": 30, "sink_tokens": 2}):
        torch.testing.assert_close(attend(AttentionCall(query, key, value, **sizes)), plain)


@pytest.mark.parametrize("name", RULES)
def test_log_sum_exps_and_their_gradients(name):
    rules = doubled(RULES[name])
    query, key, value = inputs()

    def want(q, k, v):
        scores = q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2) * 8**-0.5
        scores = scores.flatten(1, 2)
        if "softcap" in rules:
            scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
        if "bias" in rules:
            scores = scores + rules["bias"]
        if "alibi_slopes" in rules:
            place = torch.arange(30)
            scores = scores + rules["alibi_slopes"][:, None, None] * (place - place[:, None])
        masks = {k: r for k, r in rules.items() if k not in ("softcap", "alibi_slopes", "sinks", "bias")}
        scores = scores.masked_fill(~reference.visible(30, 30, "cpu", causal=True, **masks), float("-inf"))
        if "sinks" in rules:
            scores = torch.cat([scores, rules["sinks"][None, :, None, None].expand(2, -1, 30, 1)], -1)
        return torch.logsumexp(scores.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0), -1)

    def mine(q, k, v):
        out, lse = attend_with_lse(AttentionCall(q, k, v, **rules))
        seen = lse > float("-inf")
        return torch.where(seen, lse, math.log(30)) + 0 * out.sum(-1).transpose(1, 2)

    got, grads = gradients(mine, (query, key, value))
    wanted, others = gradients(lambda q, k, v: want(q, k, v) + 0 * v.sum(), (query, key, value))
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-8)
    for grad, other in zip(grads[:2], others[:2]):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-7)


def test_parts_that_share_no_key_merge_to_the_whole():
    query, key, value = inputs()
    parts = [
        attend_with_lse(AttentionCall(query, key, value, kv_start=torch.tensor([a, a]), kv_end=torch.tensor([b, b])))
        for a, b in ((0, 7), (7, 8), (8, 30))
    ]
    out, lse = merge(parts)
    whole, wanted = attend_with_lse(AttentionCall(query, key, value))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, wanted)


def test_a_narrower_window_stays_and_masks_of_values_are_refused():
    call = AttentionCall(*inputs())
    assert call.narrowed(7, 2).sink_tokens == 2
    assert call.with_(window=4).narrowed(7, 2).window == 4
    assert call.with_(window=9).narrowed(7, 2).sink_tokens == 0
    assert call.with_(causal=False).narrowed(7).window is None
    with pytest.raises(UnsupportedError, match="drop the window option"):
        call.with_(causal=False, bias=torch.ones(1, 1, 30, 30, dtype=torch.bool)).narrowed(7)


def test_a_call_passes_through_a_signature():
    call = AttentionCall(*inputs(), q_offset=torch.tensor([3]), kv_end=7, window=5)
    again = CALL.unflatten(CALL.flatten(call))
    assert all(getattr(again, name) is getattr(call, name) for name in vars(call))
    assert len(CALL.flatten(call)) == len(CALL.names()) == len(set(CALL.names()))
    assert "SymInt q_offset, Tensor? q_offset_tensor" in CALL.schema("", "Tensor")
