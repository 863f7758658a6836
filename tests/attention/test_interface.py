"""The contract with transformers: masks become descriptors of a few numbers, and no argument is swallowed."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, masking_utils

from rehead.attention import mask_function as masking
from rehead.attention.interface import IGNORED, register, tiled_attention
from rehead.attention.kernels import reference
from rehead.attention.mask import TiledMask
from rehead.attention.mask_function import tiled_mask
from rehead.errors import UnsupportedError, UsageError

register()  # what importing rehead.patches does

CONFIG = LlamaConfig(sliding_window=6, attention_chunk_size=8)
PAD = torch.ones(2, 20, dtype=torch.bool)
PAD[0, :4] = False
PAD[1, 17:] = False
HOLES = PAD.clone()
HOLES[1, 5] = False


def made(create, q_length=20, attention_mask=None, position_ids=None, past=None, **kwargs):
    """What transformers' own mask functions make of the same arguments: our descriptor and SDPA's dense mask."""
    out = []
    for name in ("rehead_tiled", "sdpa"):
        config = LlamaConfig(sliding_window=6, attention_chunk_size=8)
        config._attn_implementation = name
        out.append(
            create(
                config,
                torch.zeros(2, q_length, 4),
                attention_mask,
                past,
                position_ids=position_ids,
                **({"allow_is_causal_skip": False} if name == "sdpa" else {}),
                **kwargs,
            )
        )
    return out


CREATORS = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunk": masking_utils.create_chunked_causal_mask,
}
PACKED = torch.cat([torch.arange(9), torch.arange(11)])[None]


@pytest.mark.parametrize("padding", [None, PAD, HOLES], ids=["full", "padded", "holes"])
@pytest.mark.parametrize("kind", CREATORS)
def test_descriptor_says_what_the_dense_mask_says(kind, padding):
    mask, dense = made(CREATORS[kind], attention_mask=padding)
    assert isinstance(mask, TiledMask)
    assert mask.dense is None
    assert torch.equal(mask.materialize(), dense.expand_as(mask.materialize()))
    assert sum(t.numel() for t in mask.tensors().values()) <= 4 * 2 * 20


@pytest.mark.parametrize("kind", CREATORS)
def test_packed_sequences(kind):
    mask, dense = made(CREATORS[kind], position_ids=PACKED)
    assert mask.dense is None
    assert mask.q_segments is not None
    assert torch.equal(mask.materialize(), dense.expand_as(mask.materialize()))


class Cache:
    """What a mask asks of a cache: this one has seen some tokens and dropped the first of them."""

    is_compileable = False

    def __init__(self, seen, dropped, length=None, as_tensor=False):
        self.seen, self.dropped, self.length, self.as_tensor = seen, dropped, length, as_tensor
        self.counter = torch.tensor(seen)

    def get_query_offset(self, layer_idx):
        return self.counter if self.as_tensor else self.seen

    def get_mask_sizes(self, query_length, layer_idx):
        return (self.length or self.seen + query_length - self.dropped), self.dropped


@pytest.mark.parametrize("kind", CREATORS)
@pytest.mark.parametrize("cache", [Cache(15, 0), Cache(15, 3), Cache(15, 0, 32, as_tensor=True), Cache(0, 0, 32)])
@pytest.mark.parametrize("padded", [False, True])
def test_caches(kind, cache, padded):
    total = cache.seen + 5
    padding = None
    if padded:
        padding = torch.ones(2, total, dtype=torch.bool)
        padding[0, : min(4, cache.seen)] = False
    mask, dense = made(CREATORS[kind], 5, padding, past=cache)
    assert mask.dense is None
    assert torch.equal(mask.materialize(), dense.expand_as(mask.materialize()))


@pytest.mark.parametrize("kind", CREATORS)
@pytest.mark.parametrize("padding", [None, PAD, HOLES], ids=["full", "padded", "holes"])
def test_masks_that_may_not_wait_for_the_device(kind, padding, monkeypatch):
    """Decoding on a GPU keeps positions and padding as tensors; they must say, and compute, the same."""
    monkeypatch.setattr(masking, "_may_wait", lambda tensor, q_length: False)
    cache = Cache(17, 0, 20, as_tensor=True)
    mask, dense = made(CREATORS[kind], 3, padding, past=cache)
    assert isinstance(mask.q_offset, torch.Tensor)
    assert (mask.key_mask is None) == (padding is None)
    assert torch.equal(mask.materialize(), dense.expand_as(mask.materialize()))
    query = Q[:, :, 17:]
    same(tiled_attention(MODULE, query, K, V, mask)[0], define(query=query, causal=False, bias=dense))


@pytest.mark.parametrize("wait", [True, False])
def test_a_static_caches_counter_is_not_kept(monkeypatch, wait):
    monkeypatch.setattr(masking, "_may_wait", lambda tensor, q_length: wait)
    cache = Cache(7, 0, 32, as_tensor=True)
    mask, _ = made(masking_utils.create_causal_mask, 3, past=cache)
    cache.counter.add_(3)
    assert int(mask.q_offset) == 7


def test_unknown_masks_are_dense_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(masking, "_said", set())

    def every_third(batch, head, q, kv):
        return kv % 3 == 0

    with caplog.at_level(logging.WARNING, "rehead.patches"):
        for _ in range(2):
            mask, dense = made(masking_utils.create_causal_mask, or_mask_function=every_third, attention_mask=PAD)
    assert mask.dense is not None
    assert torch.equal(mask.materialize(), dense)
    assert len([r for r in caplog.records if "llama gets a dense mask" in r.message]) == 1


def test_prepared_descriptor_is_passed_on():
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    arguments = {"batch_size": 2, "kv_length": 20, "attention_mask": mask}
    assert tiled_mask(q_length=20, **arguments) is mask
    with pytest.raises(UnsupportedError, match="2-D"):
        tiled_mask(q_length=3, **arguments)


def test_bidirectional_masks():
    mask, dense = made(
        lambda config, x, attention_mask, past, position_ids=None, **kw: masking_utils.create_bidirectional_mask(
            config, x, attention_mask, allow_is_bidirectional_skip=False
        ),
        attention_mask=PAD,
    )
    assert not mask.causal
    assert torch.equal(mask.materialize(), dense.expand_as(mask.materialize()))


# The descriptor as a mask


def test_descriptor_answers_like_a_mask():
    mask, dense = made(masking_utils.create_sliding_window_causal_mask, attention_mask=HOLES)
    assert mask.shape == (2, 1, 20, 20)
    assert mask.ndim == mask.dim() == 4
    assert mask.size(-1) == 20
    assert mask.contiguous() is mask
    assert mask.to("cpu") is mask
    assert mask.to(torch.float32) is mask
    for index in (
        (slice(None), slice(None), slice(None), slice(0, 13)),
        (Ellipsis, slice(0, 13)),
        (slice(None), slice(None), slice(-5, None), slice(None)),
    ):
        assert torch.equal(mask[index].materialize(), dense.expand(2, 1, 20, 20)[index])


@pytest.mark.parametrize(
    "use",
    [
        lambda m: torch.zeros(2, 1, 20, 20) + m,
        lambda m: m + 1,
        lambda m: m & m,
        lambda m: ~m,
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: torch.zeros(2, 1, 20, 20).masked_fill(m, 0.0),
        lambda m: torch.cat([m, m]),
        lambda m: m[:, 0],
        lambda m: m[:, :, :, 3:],
        lambda m: m.expand(2, 4, 20, 20),
        lambda m: nn.functional.scaled_dot_product_attention(
            torch.zeros(2, 1, 20, 4), torch.zeros(2, 1, 20, 4), torch.zeros(2, 1, 20, 4), attn_mask=m
        ),
    ],
)
def test_descriptor_refuses_arithmetic(use):
    """A model that reads the mask itself would otherwise drop it without a word."""
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    with pytest.raises((UnsupportedError, TypeError)) as error:
        use(mask)
    assert "\n" not in str(error.value) or error.type is TypeError


# The attention function

MODULE = nn.Module()
MODULE.is_causal = True
GEN = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, h, 20, d, generator=GEN) for h, d in ((4, 8), (2, 8), (2, 6)))


def define(mask=None, query=Q, key=K, value=V, **rules):
    rules = {"scale": query.shape[-1] ** -0.5, "causal": True, **rules}
    return reference.attention(query, key, value, **rules).float()


def same(mine, expected):
    torch.testing.assert_close(mine, expected, atol=2e-6, rtol=1e-5)


def test_no_mask_means_causal_from_the_top_left():
    out, weights = tiled_attention(MODULE, Q, K, V, None)
    assert weights is None
    same(out, define())
    # A static cache on its first prefill: keys after the queries are empty slots.
    same(tiled_attention(MODULE, Q[:, :, :9], K, V, None)[0], define(query=Q[:, :, :9]))
    same(tiled_attention(MODULE, Q[:, :, :1], K, V, None)[0], define(query=Q[:, :, :1], causal=False))
    same(tiled_attention(MODULE, Q, K, V, None, is_causal=False)[0], define(causal=False))
    same(tiled_attention(MODULE, Q, K, V, None, sliding_window=5)[0], define(window=5))


def test_every_rule_reaches_the_kernel():
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    bias = torch.randn(1, 4, 20, 20, generator=GEN)
    same(tiled_attention(MODULE, Q, K, V, None, scaling=0.1)[0], define(scale=0.1))
    same(tiled_attention(MODULE, Q, K, V, None, softcap=2.0)[0], define(softcap=2.0))
    same(tiled_attention(MODULE, Q, K, V, None, s_aux=sinks)[0], define(sinks=sinks))
    same(tiled_attention(MODULE, Q, K, V, None, position_bias=bias)[0], define(bias=bias))
    mask, _ = made(masking_utils.create_sliding_window_causal_mask, attention_mask=PAD)
    same(
        tiled_attention(MODULE, Q, K, V, mask, softcap=2.0, s_aux=sinks, sliding_window=6, position_bias=bias)[0],
        define(softcap=2.0, sinks=sinks, window=6, key_mask=PAD, bias=bias),
    )


def test_packed_by_cumulative_lengths():
    cu = torch.tensor([0, 9, 20], dtype=torch.int32)
    segments = torch.tensor([[0] * 9 + [1] * 11]).expand(2, -1)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 11, "max_length_k": 11}
    expected = define(q_segments=segments, kv_segments=segments)
    same(tiled_attention(MODULE, Q, K, V, None, **lengths)[0], expected)
    mask, _ = made(masking_utils.create_causal_mask, position_ids=PACKED)
    same(tiled_attention(MODULE, Q, K, V, mask, **lengths)[0], expected)


def test_masks_of_the_users_own():
    seen = (torch.arange(400).view(1, 1, 20, 20) % 5 > 0) & torch.ones(20, 20, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = define(causal=False, bias=seen)
    alive = seen.any(-1).expand(2, 1, -1)[:, 0]
    same(tiled_attention(MODULE, Q, K, V, seen)[0][alive], expected[alive])
    same(tiled_attention(MODULE, Q, K, V, added)[0][alive], expected[alive])
    bias = torch.randn(1, 4, 20, 20, generator=GEN)
    expected = define(causal=False, bias=bias.masked_fill(~seen, -torch.inf))
    for mask in (seen, added):
        same(tiled_attention(MODULE, Q, K, V, mask, position_bias=bias)[0][alive], expected[alive])


def test_sinks_of_each_token():
    sinks = torch.randn(2, 4, 20, 1, generator=GEN)
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    out = tiled_attention(MODULE, Q, K, V, mask, sinks=sinks)[0]
    scores = (Q @ K.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~mask.materialize(), -torch.inf)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    same(out, (weights @ V.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("kind", ["bool", "float", "dense descriptor"])
def test_sinks_of_each_token_beside_a_dense_mask(kind):
    sinks = torch.randn(2, 4, 20, 1, generator=GEN)
    seen = (torch.rand(2, 1, 20, 20, generator=GEN) > 0.4) & torch.ones(20, 20, dtype=torch.bool).tril()
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    if kind == "dense descriptor":
        mask = TiledMask(2, 20, 20, torch.device("cpu"), causal=False, dense=seen)
    scores = (Q @ K.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~seen, -torch.inf)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    out = tiled_attention(MODULE, Q, K, V, mask, sinks=sinks)[0]
    same(out, (weights @ V.repeat_interleave(2, 1)).transpose(1, 2))


def test_keys_chosen_by_an_indexer():
    indices = torch.rand(2, 20, 20, generator=GEN).topk(7).indices
    chosen = torch.zeros(2, 20, 20, dtype=torch.bool).scatter(-1, indices, True)[:, None]
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    same(
        tiled_attention(MODULE, Q, K, V, mask, indices=indices)[0],
        define(key_mask=PAD, bias=chosen),
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "word"),
    [
        ({"dropout": 0.1}, UnsupportedError, "dropout"),
        ({"output_attentions": True}, UsageError, "eager"),
        ({"head_mask": torch.ones(4)}, UnsupportedError, "head_mask"),
        ({"cache": SimpleNamespace()}, UnsupportedError, "cache"),
        ({"block_indices": torch.zeros(1)}, UnsupportedError, "block_indices"),
        ({"something_new": 1}, UnsupportedError, "something_new"),
    ],
)
def test_nothing_is_swallowed(kwargs, error, word):
    with pytest.raises(error, match=word) as caught:
        tiled_attention(MODULE, Q, K, V, None, **kwargs)
    assert "\n" not in str(caught.value)


def test_what_does_not_matter_is_let_through():
    out = tiled_attention(
        MODULE, Q, K, V, None, position_ids=PACKED, use_cache=True, head_mask=None, cache=DynamicCache()
    )[0]
    same(out, define())
    assert "attention_mask" not in IGNORED


def test_window_and_mask_must_agree():
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    with pytest.raises(UnsupportedError, match="window of 5"):
        tiled_attention(MODULE, Q, K, V, mask, sliding_window=5)
    tiled_attention(MODULE, Q, K, V, mask, sliding_window=20)


def test_a_mask_of_another_length():
    mask, _ = made(masking_utils.create_causal_mask, attention_mask=PAD)
    same(
        tiled_attention(MODULE, Q, K[:, :, :15], V[:, :, :15], mask)[0],
        define(key=K[:, :, :15], value=V[:, :, :15], key_mask=PAD[:, :15]),
    )
    with pytest.raises(UnsupportedError, match="covers the whole cache"):
        tiled_attention(MODULE, Q, torch.cat([K, K], 2), torch.cat([V, V], 2), mask)
