"""Masks in blocks: the record and its checks, the CPU's tiles, decoding, and transformers' masks that hold one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import some_blocks

from rehead.attention.attend import _as_bias, attend, attend_with_lse
from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import CALL, AttentionCall
from rehead.attention.kernels import reference
from rehead.attention.mask import TiledMask
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.patches import patch_model


def inputs(batch=2, heads=4, kv_heads=2, rows=70, keys=70, dim=8):
    gen = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(function, tensors, *more):
    out = function(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), [*tensors, *more])


RULES = {
    "causal": {},
    "not causal": {"causal": False},
    "a window and first tokens": {"window": 11, "sink_tokens": 3},
    "chunk": {"chunk": 23},
    "padding": {"kv_start": torch.tensor([9, 0]), "kv_end": torch.tensor([70, 41])},
    "soft cap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=torch.float64)},
    "packed": {name: torch.arange(70)[None].expand(2, -1) // 30 for name in ("q_segments", "kv_segments")},
}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_tiles_are_the_definition(name, sizes):
    rules = {"causal": True, "blocks": some_blocks(*sizes, 70, 70, 16, 32), **RULES[name]}
    got, grads = gradients(lambda q, k, v: attend(AttentionCall(q, k, v, **rules)), inputs())
    want, wanted = gradients(lambda q, k, v: reference.attention(q, k, v, scale=8**-0.5, **rules), inputs())
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("wide", [1, 4])
def test_gradients_of_sinks_and_biases_head_by_head(wide):
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(-1, 1, wide * 70 * 70, dtype=torch.float64).view(1, wide, 70, 70).requires_grad_()
    rules = {"blocks": some_blocks(1, 4, 70, 70), "sinks": sinks, "bias": bias}
    tensors = inputs()
    got, grads = gradients(lambda q, k, v: attend(AttentionCall(q, k, v, **rules)), tensors, sinks, bias)
    want, wanted = gradients(
        lambda q, k, v: reference.attention(q, k, v, scale=8**-0.5, causal=True, **rules), tensors, sinks, bias
    )
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-9, rtol=1e-7)


def test_a_hidden_key_weighs_nothing_and_a_row_without_keys_is_zero():
    """softmax(q k * M), as a mask M of zeros and ones is often written, would leave a hidden key the weight e^0."""
    query, key, value = inputs(1, 1, 1, 32, 32)
    seen = torch.tensor([[[[True, False], [False, False]]]])
    out, lse = attend_with_lse(AttentionCall(query, key, value, causal=False, blocks=KeyBlocks.of(seen, 16, 16)))
    alone = attend(AttentionCall(query[:, :, :16], key[:, :, :16], value[:, :, :16], causal=False))
    torch.testing.assert_close(out[:, :16], alone)
    assert torch.equal(out[:, 16:], torch.zeros_like(out[:, 16:]))
    assert bool((lse[..., 16:] == float("-inf")).all())
    multiplied = (query @ key.transpose(-1, -2) * 8**-0.5) * seen.repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert (multiplied.softmax(-1)[0, 0, :16, 16:].sum(-1) > 0.1).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_are_the_mask_and_transpose(data):
    shape = [data.draw(st.integers(1, 4)) for _ in range(4)]
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=(n := torch.Size(shape).numel()), max_size=n)))
    seen = seen.view(shape)
    num_q, num_k = shape[2] * 16 - data.draw(st.integers(0, 15)), shape[3] * 32 - data.draw(st.integers(0, 31))
    blocks = KeyBlocks.of(seen, 16, 32)
    again = KeyBlocks.checked(blocks.starts, blocks.index, num_q, num_k, rows=16, keys=32)
    whole = seen.repeat_interleave(16, 2).repeat_interleave(32, 3)[:, :, :num_q, :num_k]
    assert torch.equal(again.seen(num_q, num_k), whole)
    assert torch.equal(again.transposed(num_k).seen(num_k, num_q), whole.transpose(2, 3))
    cut = 16 * data.draw(st.integers(0, shape[2] - 1))
    part = again.cropped(cut, num_q)
    assert torch.equal(part.seen(num_q - cut, num_k), whole[:, :, cut:])
    assert torch.equal(part.transposed(num_k).seen(num_k, num_q - cut), whole[:, :, cut:].transpose(2, 3))


def lists(starts=(0, 1, 3), index=(0, 0, 1), **changes):
    sizes = {"num_q": 32, "num_k": 40, "rows": 16, "keys": 16, **changes}
    return KeyBlocks.checked(torch.tensor([[starts]]), torch.tensor(index), **sizes)


def test_lists_that_are_wrong_are_refused_in_one_line():
    lists(causal_from=0)
    for changes, message in (
        ({"index": (0, 0, 3)}, "key block 3 is out of range: 40 keys have 3 blocks of 16"),
        ({"index": (0, -1, 1)}, "key block -1 is out of range"),
        ({"index": (0, 1, 0)}, "not in ascending order"),
        ({"index": (0, 1, 1)}, "not in ascending order"),
        ({"index": (1, 0, 1), "causal_from": 0}, "row block 0 names key block 1, which begins after its last row"),
        ({"starts": (0, 2, 1)}, "block starts must rise"),
        ({"starts": (0, 1, 4)}, "block starts must rise"),
        ({"starts": (1, 1, 3)}, "block starts must rise"),
        ({"starts": (0, 3)}, "32 rows in blocks of 16 have 3"),
        ({"rows": 24}, "give a power of two from 16"),
        ({"keys": 8}, "give a power of two from 16"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            lists(**changes)
        assert "\n" not in str(error.value)
    lists(index=(1, 0, 1), causal_from=16)
    with pytest.raises(UsageError, match="give int32, 1 dimensions"):
        KeyBlocks.checked(torch.tensor([[[0, 1]]]), torch.tensor([0.0]), 16, 16, rows=16, keys=16)


def test_a_call_refuses_lists_for_other_heads_or_rows():
    tensors = inputs()
    with pytest.raises(UsageError, match="for 1 batch rows and 3 heads; the call has 2 and 4"):
        attend(AttentionCall(*tensors, blocks=some_blocks(1, 3, 70, 70)))
    with pytest.raises(UsageError, match="70 rows in blocks of 16 have 6"):
        attend(AttentionCall(*tensors, blocks=some_blocks(1, 1, 60, 70)))


def test_a_call_with_lists_passes_through_a_signature():
    call = AttentionCall(*inputs(), window=5, blocks=some_blocks(1, 4, 70, 70), softcap=2.0)
    again = CALL.unflatten(CALL.flatten(call))
    assert {name: getattr(again.blocks, name) for name in ("starts", "index", "rows", "keys")} == vars(call.blocks)
    assert (again.window, again.softcap, again.bias) == (5, 2.0, None)
    assert "Tensor? blocks_starts, Tensor? blocks_index, SymInt? blocks_rows" in CALL.schema("", "Tensor")
    assert CALL.unflatten(CALL.flatten(call.with_(blocks=None))).blocks is None


def test_a_mask_object_holds_lists_and_first_tokens():
    blocks = some_blocks(1, 2, 70, 70)
    mask = TiledMask(1, 70, 70, torch.device("cpu"), window=9, sink_tokens=2, blocks=blocks)
    query, key, value = inputs(1, 2, 2)
    seen = mask.materialize()
    want = attend(AttentionCall(query, key, value, causal=False, bias=seen))
    torch.testing.assert_close(attend(AttentionCall(query, key, value, **mask.rules())), want)
    part = mask[:, :, 16:70, :70]
    assert torch.equal(part.materialize(), seen[:, :, 16:])
    assert part.to("cpu").blocks is part.blocks
    with pytest.raises(UsageError, match="cut between blocks"):
        mask[:, :, 7:, :]
    last = mask[:, :, 64:, :]
    step = attend(AttentionCall(query[:, :, 64:], key, value, **last.rules()))
    torch.testing.assert_close(step, want[:, 64:])


def test_a_model_takes_such_a_mask():
    model = tiny_model("llama")
    tokens = torch.randint(8, 120, (1, 60), generator=torch.Generator().manual_seed(0))
    mask = TiledMask(1, 60, 60, torch.device("cpu"), window=25, sink_tokens=2, blocks=some_blocks(1, 1, 60, 60))
    hidden = torch.zeros(1, 1, 60, 60).masked_fill(~mask.materialize(), torch.finfo(torch.float32).min)
    rows = mask.materialize()[0, 0].any(-1)  # eager attention gives rows without keys the mean of all values
    rows[int(rows.logical_not().nonzero().min()) if not rows.all() else 60 :] = False
    with torch.no_grad():
        want = model(tokens, attention_mask=hidden, use_cache=False).logits
        with patch_model(model, "tiled"):
            got = model(tokens, attention_mask=mask, use_cache=False).logits
    assert int(rows.sum()) > 30
    torch.testing.assert_close(got[0, rows], want[0, rows], atol=2e-5, rtol=1e-5)


def test_a_decode_step_has_its_lists_as_a_bias():
    query, key, value = inputs(rows=5)
    blocks = some_blocks(1, 4, 5, 70)
    for rules in ({}, {"window": 20, "sink_tokens": 3}, {"bias": torch.ones(1, 1, 5, 70, dtype=torch.bool)}):
        call = AttentionCall(query, key, value, q_offset=65, blocks=blocks, **rules)
        step = _as_bias(call)
        assert step.blocks is None
        assert step.window is None
        torch.testing.assert_close(attend(step), attend(call))


def test_decoding_kernels_refuse_lists():
    from rehead.attention.kernels import decode

    query, key, value = inputs()
    with pytest.raises(UsageError, match="sink tokens or blocks"):
        decode(query[:, :, :2], key, value, blocks=some_blocks(1, 1, 2, 70))
    with pytest.raises(UsageError, match="sink tokens or blocks"):
        decode(query[:, :, :2], key, value, window=3, sink_tokens=2)
