"""The benchmarks of this part run, on sizes that say nothing about speed, and count what they claim to count."""

import pytest
import torch

from rehead.benchmarks import cpu_attention, end_to_end
from rehead.errors import UnsupportedError, UsageError
from rehead.models.modeling.modeling_rehead_cache import cache_argument

SMALL = end_to_end.Setting(
    batch=2, context=40, steps=8, hidden_size=32, intermediate_size=48, layers=2, heads=4, vocab_size=64, padding=5
)


@pytest.mark.parametrize("backend", ["graph", "none"])
def test_end_to_end(backend, capsys):
    setting = end_to_end.Setting(**{**SMALL.__dict__, "backend": backend})
    rows = end_to_end.run(setting, [1, 4])
    assert [(row.kv_heads, row.implementation) for row in rows] == [
        (4, "tiled"), (4, "sdpa"), (1, "tiled"), (1, "sdpa"),
    ]  # fmt: skip
    cache_bytes = 2 * 44 * 2 * 2 * 4 * 8 * 4
    weights = sum(
        p.numel() * 4 for n, p in end_to_end.build(setting, 4, "cpu").named_parameters() if "embed_tokens" not in n
    )
    assert rows[0].bytes_read == weights + cache_bytes
    assert rows[0].speedup == rows[0].share == 1.0
    assert rows[2].predicted == rows[0].bytes_read / rows[2].bytes_read
    assert "tokens/s" in end_to_end.table(rows)


def test_both_ways_of_decoding_write_the_same_tokens():
    """The replayed step and `generate` are the same computation."""
    model = end_to_end.build(SMALL, 2, "cpu")
    cache = end_to_end.filled_cache(model, SMALL)
    first = torch.randint(10, 64, (2, SMALL.context), generator=torch.Generator().manual_seed(0))
    end_to_end.rewind(cache, SMALL.context - 1)
    out = model.generate(
        first, **cache_argument(cache), max_new_tokens=4, do_sample=False, disable_compile=True, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    end_to_end.rewind(cache, SMALL.context - 1)
    ids, positions = first[:, -1:].clone(), torch.full((2, 1), SMALL.context - 1)
    mask = torch.ones(2, SMALL.context + SMALL.steps, dtype=torch.long)
    tokens = []
    with torch.no_grad():
        for _ in range(4):
            logits = model(
                ids, attention_mask=mask, **cache_argument(cache), position_ids=positions, use_cache=True
            ).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            positions += 1
            tokens.append(ids)
    assert torch.equal(torch.cat(tokens, 1), out[:, SMALL.context :])


@pytest.mark.parametrize("name", end_to_end.IMPLEMENTATIONS)
def test_every_implementation_computes_the_same_and_leaves_the_model_as_it_was(name):
    model = end_to_end.build(SMALL, 2, "cpu")
    ids = torch.randint(10, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        with end_to_end.applied(model, name):
            inside = model(ids).logits
        after = model(ids).logits
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=0)
    assert torch.equal(after, before)
    assert model.config._attn_implementation == "sdpa"


def test_end_to_end_refuses():
    with pytest.raises(UsageError, match="flash"):
        end_to_end.run(SMALL, [1], ["flash"])
    with pytest.raises(UnsupportedError, match="divisor"):
        end_to_end.run(SMALL, [3])
    # Before anything is allocated: a laptop would be brought down by the default sizes.
    with pytest.raises(UnsupportedError, match="give smaller"):
        end_to_end.run(end_to_end.Setting(**{**SMALL.__dict__, "context": 1 << 40}), [1])


def test_cpu_attention():
    cases = [
        cpu_attention.Case("window", 300, 64, heads=2, kv_heads=1, dim=8),
        cpu_attention.Case("padded", 300, padding=40, heads=2, kv_heads=1, dim=8, peer=False),
    ]
    before = torch.get_num_threads()
    try:
        rows = cpu_attention.run(cases, threads=1, rounds=1)
    finally:
        torch.set_num_threads(before)
    assert all(row["difference"] < 1e-4 for row in rows)
    assert rows[0]["speedup"] > 0
    assert rows[0]["rehead_tiled MB"] is not None
    assert "sdpa fwd" not in rows[1]
    assert len(cpu_attention.table(rows).splitlines()) == 3


def test_growth_says_how_memory_grows():
    rows = [
        {"name": f"window 1024, {n}k", "heads": 8, "kv_heads": 2, "length": n * 1024, "rehead_tiled MB": size}
        for n, size in ((4, 8.192), (16, 32.768))
    ]
    line = "extra memory, window 1024, 8/2 heads: 8 MB at 4k (2.0 KB a token), 33 MB at 16k (2.0 KB a token)"
    assert cpu_attention.growth([*rows, {**rows[0], "name": "causal 4k"}]) == line
