"""The CPU path against the float64 definition: every rule alone, and random combinations of them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rehead.attention.call import CALL, AttentionCall
from rehead.attention.cpu import attention
from rehead.attention.kernels import reference
from rehead.errors import UnsupportedError, UsageError


def tensors(b, h, k, sq, skv, d, dv=None, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(b, h, sq, d), make(b, k, skv, d), make(b, k, skv, dv or d)


def define(*args, **rules):
    """The float64 definition, with the default scale filled in."""
    rules.setdefault("scale", args[0].shape[-1] ** -0.5)
    return reference.attention(*args, **{"causal": True, **rules})


def compare(args, rules, extra=(), atol=1e-10):
    """Output and gradients of both, the gradients of `extra` rules (sinks, bias) included."""
    outs, grads = [], []
    for function in (attention, define):
        leaves = [a.clone().requires_grad_() for a in args]
        named = {n: (rules[n].clone().requires_grad_() if n in extra else rules[n]) for n in rules}
        out = function(*leaves, **named).double()
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (out * weight).sum().backward()
        outs.append(out.detach())
        grads.append([x.grad.double() for x in [*leaves, *(named[n] for n in extra)]])
    torch.testing.assert_close(outs[0], outs[1], atol=atol, rtol=0)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol * 10, rtol=0)


PAD = torch.tensor([[False] * 5 + [True] * 35, [True] * 30 + [False] * 10])
HOLES = torch.tensor([[i % 3 != 1 for i in range(40)], [i > 7 for i in range(40)]])
SEGMENTS = torch.tensor([[0] * 11 + [1] * 20 + [2] * 9, [0] * 40])
TANGLED = torch.tensor([[i % 2 for i in range(40)], [i // 13 for i in range(40)]])

RULES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 7},
    "window one": {"window": 1},
    "window wider than the sequence": {"window": 400},
    "window without causality": {"window": 5, "causal": False},
    "chunk": {"chunk": 16},
    "chunk and window": {"chunk": 16, "window": 5},
    "left and right padding": {"key_mask": PAD},
    "holes": {"key_mask": HOLES},
    "bounds": {"kv_start": torch.tensor([3, 0]), "kv_end": torch.tensor([40, 22])},
    "packed": {"q_segments": SEGMENTS, "kv_segments": SEGMENTS},
    "packed with a window": {"q_segments": SEGMENTS, "kv_segments": SEGMENTS, "window": 4},
    "tangled segments": {"q_segments": TANGLED, "kv_segments": TANGLED},
    "softcap": {"softcap": 1.5},
    "softcap, window and padding": {"softcap": 1.5, "window": 9, "key_mask": PAD},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi, padding and window": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.06]), "key_mask": PAD, "window": 9},
    "sinks": {"sinks": torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64)},
    "sinks and padding": {"sinks": torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64), "key_mask": PAD},
    "bool bias": {"bias": (torch.arange(1600).view(1, 1, 40, 40) % 7 != 3), "causal": False},
    "a packed sequence without keys": {"q_segments": SEGMENTS, "kv_segments": SEGMENTS.clamp(max=1), "causal": False},
    "nothing visible": {"kv_end": torch.tensor([0, 40])},
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", RULES)
def test_rule_matches_definition(name, kv_heads):
    rules = RULES[name]
    extra = ("sinks",) if "sinks" in rules else ()
    compare(tensors(2, 4, kv_heads, 40, 40, 8), rules, extra)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 40, 40), (1, 4, 40, 40), (2, 1, 1, 40), (2, 4, 1, 40)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_and_its_gradient(shape, softcap):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    compare(tensors(2, 4, 2, 40, 40, 8), {"bias": bias, "softcap": softcap}, ("bias",))


@pytest.mark.parametrize("offset", [0, 3, 24, torch.tensor(24)])
@pytest.mark.parametrize("rules", [{}, {"window": 6}, {"chunk": 8}, {"alibi_slopes": torch.tensor([0.5, 0.2])}])
def test_queries_that_start_later(offset, rules):
    """Chunked prefill (offset = Skv - Sq) and a static cache whose tail is empty (offset < Skv - Sq)."""
    compare(tensors(2, 2, 1, 16, 40, 8), {"q_offset": offset, **rules})


@pytest.mark.parametrize("n_query", [1, 2, 15])
@pytest.mark.parametrize("name", ["left and right padding", "holes", "causal", "alibi", "softcap", "sinks", "bounds"])
def test_decoding(name, n_query):
    rules = dict(RULES[name])
    rules["q_offset"] = 40 - n_query
    compare(tensors(2, 4, 2, n_query, 40, 8), rules)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("name", ["causal", "chunk", "packed", "softcap", "window"])
def test_a_scale_that_is_not_positive(name, scale):
    compare(tensors(2, 4, 2, 40, 40, 8), {**RULES[name], "scale": scale})


@pytest.mark.parametrize(("d", "dv"), [(8, 12), (12, 8), (33, 33), (7, 1)])
def test_value_dim_differs(d, dv):
    compare(tensors(2, 4, 2, 20, 20, d, dv), {"window": 6})


@pytest.mark.parametrize("rules", [{}, {"window": 300}, {"key_mask": "right"}, {"softcap": 3.0}, {"chunk": 257}])
def test_more_than_one_block(rules):
    """Long enough for several query blocks, several key tiles and merges between them."""
    if rules.get("key_mask") == "right":
        rules = {"key_mask": torch.arange(700)[None].expand(2, -1) < torch.tensor([[700], [523]])}
    compare(tensors(2, 2, 1, 700, 700, 8), rules, atol=1e-9)


@pytest.mark.parametrize("name", ["causal", "window", "left and right padding", "softcap", "alibi", "holes"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_calls_cut_along_heads(monkeypatch, name, kv_heads):
    monkeypatch.setattr("rehead.attention.cpu.lanes.STEP_ELEMENTS", 1)
    compare(tensors(2, 4, kv_heads, 40, 40, 8), RULES[name])
    bias = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    compare(tensors(2, 4, kv_heads, 40, 40, 8), {"bias": bias}, ("bias",))


def test_wide_band_is_split_into_edges_and_interior(monkeypatch):
    monkeypatch.setattr("rehead.attention.cpu.plan.MASK_ELEMENTS", 1 << 12)
    compare(tensors(1, 2, 1, 300, 300, 8), {"window": 150})
    compare(tensors(1, 2, 1, 300, 300, 8), {"alibi_slopes": torch.tensor([0.5, 0.2]), "window": 150})


@pytest.mark.parametrize("shape", [(1, 2, 300, 300), (2, 1, 300, 1), (1, 1, 1, 300), (1, 2, 300, 1)])
def test_bias_gradient_from_many_tiles(monkeypatch, shape):
    monkeypatch.setattr("rehead.attention.cpu.plan.MASK_ELEMENTS", 1 << 14)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    compare(tensors(2, 2, 1, 300, 300, 8), {"bias": bias}, ("bias",))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["causal", "window", "left and right padding", "softcap", "alibi", "sinks", "holes"])
def test_dtypes(name, dtype, atol):
    args = tensors(2, 4, 2, 40, 40, 16, dtype=dtype)
    out = attention(*args, **RULES[name])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), define(*args, **RULES[name]), atol=atol, rtol=0)


@st.composite
def cases(draw):
    b, kv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    skv = draw(st.integers(1, 30))
    sq = draw(st.integers(1, skv))
    rules = {"causal": draw(st.booleans()), "q_offset": draw(st.integers(0, skv))}
    for name, values in {"window": st.integers(1, 30), "chunk": st.integers(1, 20), "softcap": st.just(2.0)}.items():
        if draw(st.booleans()):
            rules[name] = draw(values)
    bools = st.lists(st.lists(st.booleans(), min_size=skv, max_size=skv), min_size=b, max_size=b)
    ints = lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=b, max_size=b)  # noqa: E731
    if draw(st.booleans()):
        rules["key_mask"] = torch.tensor(draw(bools))
    if draw(st.booleans()):
        rules["q_segments"], rules["kv_segments"] = torch.tensor(draw(ints(sq))), torch.tensor(draw(ints(skv)))
    if draw(st.booleans()):
        rules["kv_start"] = torch.tensor(draw(st.lists(st.integers(0, skv), min_size=b, max_size=b)))
    if draw(st.booleans()):
        rules["sinks"] = torch.linspace(-1, 1, kv * group, dtype=torch.float64)
    if draw(st.booleans()):
        rules["alibi_slopes"] = torch.linspace(0.1, 1, kv * group)
    return (b, kv * group, kv, sq, skv, 4), rules


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_combination(case):
    shape, rules = case
    compare(tensors(*shape), rules)


def test_inputs_are_left_alone_and_the_layout_is_free():
    q, k, v = tensors(2, 4, 2, 20, 20, 8)
    q2, k2, v2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    before = [x.clone() for x in (q2, k2, v2)]
    a, b = attention(q, k, v), attention(q2, k2, v2)
    assert torch.equal(a, b)
    assert a.is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(before, (q2, k2, v2), strict=True))


def test_a_later_token_cannot_leak():
    q, k, v = tensors(1, 4, 2, 600, 600, 8, dtype=torch.float32)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 400:], v2[:, :, 400:] = 7.0, -3.0
    for rules in ({}, {"window": 100}, {"softcap": 2.0}, {"alibi_slopes": torch.ones(4)}):
        assert torch.equal(attention(q, k, v, **rules)[:, :400], attention(q, k2, v2, **rules)[:, :400])


def test_operator_registration_is_sound():
    from rehead.attention.cpu.operator import cpu_attention

    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 6, 6, 8))
    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[0, :2] = False
    torch.library.opcheck(cpu_attention, tuple(CALL.flatten(AttentionCall(q, k, v, scale=0.3, window=3, key_mask=pad))))


@pytest.mark.parametrize(
    ("shapes", "dtype", "word"),
    [
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), torch.float32, "divide the query heads"),
        (((1, 2, 4, 8), (1, 2, 4, 9), (1, 2, 4, 8)), torch.float32, "head_dim"),
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), torch.float32, "reshape"),
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), torch.int32, "cast"),
    ],
)
def test_bad_input_is_one_line(shapes, dtype, word):
    with pytest.raises(UnsupportedError, match=word) as error:
        attention(*(torch.ones(s).to(dtype) for s in shapes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ({"window": 0}, "window is 0; give a positive number"),
        ({"window": -3}, "window is -3"),
        ({"chunk": 0}, "chunk is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask has shape 2x5; it must be 2x6"),
        ({"sinks": torch.zeros(3)}, "sinks has shape 3"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes has shape 3"),
        ({"q_segments": torch.zeros(2, 6)}, "go together"),
    ],
)
def test_rules_that_do_not_fit_are_one_line(rules, word):
    """Left to the kernel, a negative window would end the process."""
    with pytest.raises(UsageError, match=word) as error:
        attention(*tensors(2, 4, 2, 6, 6, 8), **rules)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(0, 4, 2, 6, 6, 8), (2, 4, 2, 0, 6, 8), (2, 4, 2, 6, 0, 8), (2, 4, 2, 1, 0, 8)])
def test_nothing_in_nothing_out(shape):
    args = [x.requires_grad_() for x in tensors(*shape)]
    mask = torch.ones(shape[0], shape[4], dtype=torch.bool)
    out = attention(*args, key_mask=mask)
    out.sum().backward()
    assert out.shape == (shape[0], shape[3], 4, 8)
    assert not out.any()
    assert all(x.grad.shape == x.shape for x in args)
