"""The decode kernels against plain float64 attention; see ``test_kernels.py`` for where these tests run."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

from rehead.attention.call import CALL, AttentionCall
from rehead.attention.kernels import decode, reference
from rehead.errors import UsageError

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
needs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def holes(batch: int, count: int) -> torch.Tensor:
    mask = torch.ones(batch, count, dtype=torch.bool, device=DEVICE)
    mask[0, :9] = False
    mask[-1, 20:26] = False
    return mask


def ends(count: int) -> torch.Tensor:
    """One key hidden among visible ones; a block that only its last key is seen of; a last block of hidden keys."""
    mask = torch.ones(3, count, dtype=torch.bool, device=DEVICE)
    mask[0, 7] = False
    mask[1, :15] = False
    mask[2, 11:] = False
    return mask


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)


# name -> (batch, heads, kv_heads, num_q, num_k, dim, dim_v, rules)
CASES = {
    "one token": (2, 4, 2, 1, 70, 32, 32, {"q_offset": 69}),
    "mha": (1, 3, 3, 1, 50, 32, 32, {"q_offset": 49}),
    "mqa": (2, 8, 1, 1, 90, 16, 16, {"q_offset": 89}),
    "several tokens": (2, 4, 2, 5, 70, 32, 32, {"q_offset": 65}),
    "many rows": (1, 12, 1, 16, 60, 32, 32, {"q_offset": 44}),
    "odd head_dim": (1, 4, 2, 1, 50, 40, 24, {"q_offset": 49}),
    "static cache, tensors": (2, 4, 2, 1, 96, 32, 32, {"q_offset": ints(40), "kv_end": ints(41)}),
    "static cache, holes": (
        2,
        4,
        2,
        1,
        96,
        32,
        32,
        {"q_offset": ints(40), "kv_end": ints(41), "key_mask": holes(2, 96)},
    ),
    "static cache, per row": (2, 4, 2, 3, 96, 32, 32, {"q_offset": ints(40, 7), "kv_end": ints(43, 10)}),
    "static cache, number": (1, 4, 2, 1, 96, 32, 32, {"q_offset": 30, "kv_end": 31}),
    "left padding": (2, 4, 1, 1, 60, 32, 32, {"q_offset": 59, "kv_start": ints(0, 33)}),
    "key mask": (2, 4, 2, 2, 60, 32, 32, {"q_offset": 58, "key_mask": holes(2, 60)}),
    "key mask, ends": (3, 2, 1, 1, 44, 16, 16, {"q_offset": 43, "key_mask": ends(44)}),
    "window": (2, 4, 2, 2, 80, 32, 32, {"q_offset": 78, "window": 21}),
    "chunk": (1, 4, 2, 3, 80, 32, 32, {"q_offset": 70, "chunk": 24}),
    "soft cap": (1, 4, 2, 1, 40, 32, 32, {"q_offset": 39, "softcap": 3.0}),
    "alibi": (
        1,
        4,
        2,
        2,
        40,
        32,
        32,
        {"q_offset": 38, "alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.0], device=DEVICE)},
    ),
    "bias of each key": (2, 4, 2, 1, 70, 32, 32, {"q_offset": ints(69), "bias": noise(1, 4, 1, 70)}),
    "bias of each row": (2, 4, 1, 3, 70, 32, 32, {"q_offset": 67, "bias": noise(2, 1, 3, 70), "softcap": 5.0}),
    "dense mask": (2, 4, 2, 2, 70, 32, 32, {"q_offset": 0, "causal": False, "bias": noise(2, 4, 2, 70) > 0}),
    "sinks": (2, 4, 2, 1, 70, 32, 32, {"q_offset": 69, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)}),
    "short": (1, 4, 2, 1, 5, 32, 32, {"q_offset": 4, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)}),
    "not causal": (1, 4, 2, 4, 40, 32, 32, {"q_offset": 0, "causal": False}),
    "sinks above all scores": (
        1,
        2,
        1,
        1,
        9,
        16,
        16,
        {"q_offset": 8, "sinks": torch.tensor([200.0, -200.0], device=DEVICE)},
    ),
    "far below zero": (2, 4, 1, 2, 70, 32, 32, {"q_offset": 68, "bias": noise(2, 4, 2, 70) - 300}),
    "range beyond the keys": (
        2,
        4,
        2,
        1,
        50,
        32,
        32,
        {"q_offset": 49, "kv_start": ints(-20, 3), "kv_end": ints(80, 51)},
    ),
    "everything": (
        2,
        8,
        2,
        3,
        90,
        32,
        32,
        {
            "q_offset": ints(60, 80),
            "kv_end": ints(63, 83),
            "kv_start": ints(3, 40),
            "key_mask": holes(2, 90),
            "window": 50,
            "softcap": 4.0,
            "alibi_slopes": torch.linspace(0, 0.5, 8, device=DEVICE),
            "sinks": torch.linspace(-1, 1, 8, device=DEVICE),
        },
    ),
}
GPU_CASES = {
    "8k": (4, 32, 8, 1, 8192, 128, 128, {"q_offset": 8191, "key_mask": holes(4, 8192)}),
    "32k mqa": (1, 32, 1, 1, 32768, 128, 128, {"q_offset": ints(30000), "kv_end": ints(30001)}),
    "8k d64": (3, 16, 4, 2, 8192, 64, 64, {"q_offset": 8190, "kv_start": ints(0, 100, 8000)}),
    "d256": (1, 8, 2, 1, 4096, 256, 256, {"q_offset": 4095, "window": 1000, "softcap": 30.0}),
    "many splits": (1, 32, 1, 16, 16384, 128, 128, {"q_offset": 16000}),
}


def draw(case: tuple, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict]:
    batch, heads, kv_heads, num_q, num_k, dim, dim_v, rules = case
    torch.manual_seed(0)
    query = torch.randn(batch, num_q, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, num_k, dim, device=DEVICE).to(dtype)
    value = torch.randn(batch, kv_heads, num_k, dim_v, device=DEVICE).to(dtype)
    return [query, key, value], {"scale": dim**-0.5, **rules}


def exact(inputs: list[torch.Tensor], rules: dict) -> torch.Tensor:
    rules = {"causal": True, **rules}
    if isinstance(rules.get("kv_end"), int):
        rules["kv_end"] = ints(*[rules["kv_end"]] * inputs[0].shape[0])
    if isinstance(rules.get("kv_end"), torch.Tensor):
        rules["kv_end"] = rules["kv_end"].expand(inputs[0].shape[0])
    return reference.attention(*inputs, **rules)


def compare(case: tuple, dtype: torch.dtype) -> None:
    inputs, rules = draw(case, dtype)
    out = decode(*inputs, **rules)
    want = exact(inputs, rules)
    assert out.shape == want.shape
    assert out.is_contiguous()
    error = (out.double() - want).norm() / want.norm()
    assert error < {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], f"{error:.2e}"


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    compare(CASES[name], torch.float32)


LATENTS = {
    "8k": (2, 128, 8192, 512, 64, {"q_offset": 8191}),
    "few heads, one tile": (3, 9, 64, 512, 64, {"q_offset": 63}),
    "one key": (1, 64, 1, 512, 64, {"q_offset": 0}),
    "narrower": (2, 100, 1000, 320, 32, {"q_offset": 999}),
    "left padding": (2, 128, 2048, 512, 64, {"q_offset": 2047, "kv_start": ints(0, 2047)}),
    "static cache": (2, 64, 4096, 512, 64, {"q_offset": ints(1999), "kv_end": ints(2000)}),
    "static cache, per row": (
        3,
        128,
        512,
        512,
        64,
        {"q_offset": ints(10, 500, 64), "kv_end": ints(11, 501, 65), "kv_start": ints(3, 0, 60)},
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_hundreds(name, dtype):
    """The sizes that Hopper has a kernel of its own for."""
    batch, heads, count, rank, tail, rules = LATENTS[name]
    (query, key, _), rules = draw((batch, heads, 1, 1, count, rank + tail, rank, rules), dtype)
    latent, rest = key[..., :rank].contiguous(), key[..., rank:].contiguous()
    out = decode(query, latent, latent, key_tail=rest, **rules)
    want = exact([query, key, latent], rules)
    assert float((out.double() - want).norm() / want.norm()) < 1e-2


@needs_kernels
@pytest.mark.parametrize("tail", [8, 24])
@pytest.mark.parametrize("name", CASES)
def test_keys_that_are_also_the_values(name, tail):
    """A latent is read once, as keys beside a tail of their own and as values."""
    *sizes, dim, _, rules = CASES[name]
    (query, key, _), rules = draw((*sizes, dim + tail, dim, rules), torch.float32)
    latent, rest = key[..., :dim].contiguous(), key[..., dim:].contiguous()
    out = decode(query, latent, latent, key_tail=rest, **rules)
    want = exact([query, key, latent], rules)
    assert out.shape == want.shape
    assert float((out.double() - want).norm() / want.norm()) < 2e-5


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's stand-in for a Hopper GPU")
@pytest.mark.parametrize("shape", [(64, 64, 4, 6, 12), (16, 128, 8, 3, 12)], ids=["64 rows", "16 rows"])
@pytest.mark.parametrize("name", ["holes and window", "chunk", "range and soft cap"])
def test_tiles_as_large_as_on_a_gpu(name, shape, monkeypatch):
    module = importlib.import_module("rehead.attention.kernels.decode")
    monkeypatch.setattr(module, "launch_shape", lambda *_: module.LaunchShape(*shape))
    num_q, rules = {
        "holes and window": (1, {"q_offset": ints(699), "kv_end": ints(700), "key_mask": holes(2, 900), "window": 333}),
        "chunk": (3, {"q_offset": ints(640), "key_mask": holes(2, 900), "chunk": 256}),
        "range and soft cap": (3, {"q_offset": ints(800), "kv_start": ints(5, 790), "softcap": 4.0}),
    }[name]
    compare((2, 16 if shape[0] == 64 else 4, 1, num_q, 900, 16, 16, rules), torch.float32)


@needs_kernels
def test_what_lies_past_the_end_is_never_used():
    inputs, rules = draw(CASES["static cache, tensors"], torch.float32)
    before = decode(*inputs, **rules)
    for item in inputs[1:]:
        item[:, :, 41:] = float("nan")
    assert torch.equal(decode(*inputs, **rules), before)


@needs_kernels
def test_rows_without_keys_are_zero():
    for num_k in (60, 200):  # one part, and several to merge
        inputs, rules = draw((2, 4, 1, 1, num_k, 32, 32, {"q_offset": num_k - 1}), torch.float32)
        out = decode(*inputs, **rules | {"kv_start": ints(0, num_k)})
        assert (out[1] == 0).all()
        assert (out[0] != 0).any()


@needs_kernels
@pytest.mark.parametrize("top", [30.0, -30.0])
def test_scores_hundreds_apart(top):
    """The running maximum holds from block to block, and is taken of scaled scores: exp2 never leaves float32."""
    query, value = torch.ones(1, 2, 1, 16, device=DEVICE), noise(1, 1, 60, 16)
    key = torch.linspace(0, top, 60, device=DEVICE).view(1, 1, 60, 1).repeat(1, 1, 1, 16)
    rules = {"scale": 1.0, "q_offset": 59}
    want = exact([query, key, value], rules)
    torch.testing.assert_close(decode(query, key, value, **rules).double(), want, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("rules", [{}, {"sinks": torch.tensor([0.5, -1.0, 9.0, 0.0], device=DEVICE)}])
def test_a_merge_of_many_parts(rules, monkeypatch):
    """Two parts at a time in columns of 16, as a merge of hundreds of parts goes; the last parts weigh most."""
    module = importlib.import_module("rehead.attention.kernels.decode")
    monkeypatch.setattr(module, "split_count", lambda *_: 7)
    monkeypatch.setattr(module, "merge_shape", lambda *_: (16, 2))
    rising = torch.linspace(-20, 20, 120, device=DEVICE).expand(1, 1, 2, 120)
    for kv_end in (120, 21):
        rest = {"q_offset": 118, "kv_end": ints(kv_end), "bias": rising, **rules}
        compare((1, 4, 2, 2, 120, 16, 24, rest), torch.float32)


@needs_kernels
def test_the_operator_passes_torch_opcheck():
    from rehead.attention.kernels import ops

    inputs, _ = draw(CASES["static cache, tensors"], torch.float32)
    call = AttentionCall(*inputs, scale=0.2, q_offset=ints(40), kv_end=41, window=30)
    torch.library.opcheck(ops.decode, tuple(CALL.flatten(call)), test_utils=("test_schema", "test_faketensor"))


def test_too_many_positions_name_the_remedy():
    query = torch.randn(1, 2, 17, 8)
    with pytest.raises(UsageError, match="at most 16 query positions, not 17; call attention"):
        decode(query, query, query, scale=1.0, q_offset=0)
    with pytest.raises(UsageError, match="kv_end must be an int or an integer tensor"):
        decode(query[:, :, :1], query, query, scale=1.0, q_offset=0, kv_end=torch.tensor([1, 2, 3]))


def test_split_count_fills_the_gpu_and_no_more():
    from rehead.attention.kernels.decode import split_count

    assert split_count(128, 8192, 264, 64) == 2
    assert split_count(8, 32768, 264, 64) == 32
    assert split_count(1, 32768, 264, 64) == 256  # 128 keys each; 264 parts would round up to 192 and idle a third
    assert split_count(1, 256, 264, 64) == 2
    assert split_count(1, 60, 264, 64) == 1
    assert split_count(5000, 8192, 264, 64) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", [*CASES, *GPU_CASES])
def test_parity_on_the_gpu(name, dtype):
    compare((CASES | GPU_CASES)[name], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_graph_follows_the_growing_cache():
    inputs, rules = draw(
        (2, 8, 2, 1, 4096, 128, 128, {"q_offset": ints(99, 99), "kv_end": ints(100, 100)}), torch.bfloat16
    )
    decode(*inputs, **rules)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(*inputs, **rules)
    for fill in (100, 1000, 4096, 7):
        rules["q_offset"].fill_(fill - 1)
        rules["kv_end"].fill_(fill)
        graph.replay()
        want = exact(inputs, rules)
        assert (out.double() - want).norm() / want.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_calls_that_overlap_do_not_disturb_each_other(kv_heads):
    """On Hopper a call's programs come up, and prefetch, while the call before it still runs."""
    calls = []
    for fill in (8192, 100, 5000, 8191):
        inputs, rules = draw((2, 32, kv_heads, 1, 8192, 128, 128, {}), torch.bfloat16)
        inputs[0].add_(fill / 8192)
        rules |= {"q_offset": ints(fill - 1), "kv_end": ints(fill), "key_mask": holes(2, 8192)}
        calls.append((inputs, rules, decode(*inputs, **rules)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [decode(*inputs, **rules) for inputs, rules, _ in calls * 4]
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, calls[i % len(calls)][2]) for i, out in enumerate(outs))
    for inputs, rules, out in calls:
        want = exact(inputs, rules)
        assert (out.double() - want).norm() / want.norm() < 1e-2
