"""Block-sparse prefill: what is left out stays within the bound, whatever the queries and keys are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rehead.attention.attend import attend as dense
from rehead.attention.call import AttentionCall
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.patches import patch_model
from rehead.variants.sparse import SparseOptions, attend, choice_of, lost_mass, recorded, select

LENGTH, DIM = 512, 16
OPTIONS = SparseOptions(min_keys=64, block=32, lost_mass=0.05)
LOOSE = OPTIONS.but(lost_mass=0.25)


def drawn(kind, seed=0, batch=1, heads=4, kv_heads=2):
    """Queries, keys and values of a kind that makes the choice of blocks easy or hard."""
    gen = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, LENGTH, DIM, generator=gen)
    key = torch.randn(batch, kv_heads, LENGTH, DIM, generator=gen)
    if kind == "peaked":
        query, key = query * 4, key * 2
    elif kind == "alike":  # the rows of a block are one row and its keys one key, give or take a hundredth
        key = key[:, :, ::32].repeat_interleave(32, 2) * 3 + 0.01 * key
        query = query[:, :, ::32].repeat_interleave(32, 2) * 4 + 0.01 * query
    elif kind == "needles":  # single keys that single rows look for
        key[:, :, torch.randint(LENGTH, (9,), generator=gen)] *= 12
    elif kind == "rows that differ":  # neighbours look at different blocks
        toward = key[:, :, torch.randint(LENGTH, (LENGTH,), generator=gen)]
        query = 3 * toward.repeat_interleave(heads // kv_heads, 1)
    elif kind == "behind the samples":
        # Every row looks at the first half but those that choose, which look at the second one.
        rows, checked, _ = select.draw(query.device, batch, heads, LENGTH, 32, OPTIONS.samples, OPTIONS.seed)
        sampled = rows[..., : rows.shape[2] - checked.shape[2]]
        key = 0.1 * key
        key[..., 0] = torch.where(torch.arange(LENGTH) < LENGTH // 2, 6.0, -6.0)
        query = 0.1 * query
        query[..., 0] = 6.0
        query[..., 0].scatter_(2, sampled.long(), -6.0)
    return query, key, torch.randn(key.shape, generator=gen)


KINDS = ("plain", "peaked", "alike", "needles", "rows that differ", "behind the samples")


@pytest.mark.parametrize("checked", [192, 1 << 20])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.sampled_from([0.01, 0.05, 0.3]))
def test_the_lost_mass_stays_within_its_bound(checked, kind, seed, allowed):
    before, select.CHECKED = select.CHECKED, checked
    select.draw.cache_clear()
    try:
        call = AttentionCall(*drawn(kind, seed))
        choice = choice_of(call, OPTIONS.but(lost_mass=allowed))
    finally:
        select.CHECKED = before
        select.draw.cache_clear()
    lost = float(lost_mass(call, choice.blocks).mean())
    assert lost <= float(choice.bound) + 1e-5
    assert float(choice.bound) <= allowed
    if checked > LENGTH:  # all rows were looked at, so the estimate is the truth
        assert lost == pytest.approx(float(choice.estimate), abs=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.sampled_from([0.01, 0.05, 0.3]))
def test_the_hard_bound_holds_for_every_row(kind, seed, allowed):
    call = AttentionCall(*drawn(kind, seed), kv_start=torch.tensor([seed % 100]))
    choice = choice_of(call, OPTIONS.but(lost_mass=allowed, bound="hard"))
    lost = float(lost_mass(call, choice.blocks).max())
    assert lost <= float(choice.bound) + 1e-5
    assert float(choice.bound) <= allowed + 1e-6


def test_both_bounds_leave_out_what_they_may():
    for bound, kind, most in (("sampled", "peaked", 0.8), ("sampled", "alike", 0.5), ("hard", "alike", 0.5)):
        choice = choice_of(AttentionCall(*drawn(kind)), OPTIONS.but(bound=bound, lost_mass=0.2))
        density = choice.blocks.index.numel() / choice.visible
        assert density < most, (bound, kind)


def test_rows_that_mislead_the_choice_are_found_out():
    """The rows that choose look elsewhere than all others: those that check see it, and what they need is computed."""
    call = AttentionCall(*drawn("behind the samples"))
    misled = select.choose(call, 0.9, block=32, samples=4, first=0, local=0, seed=0)
    assert float(lost_mass(call, misled.blocks).mean()) > 0.2
    choice = select.choose(call, 0.05, block=32, samples=4, first=0, local=0, seed=0)
    assert float(lost_mass(call, choice.blocks).mean()) <= 0.05


@pytest.mark.parametrize("all_rows", [False, True])
def test_settling_what_is_kept_reads_nothing_of_the_device(all_rows):
    """A number that the host reads would make a prefill wait for the GPU in every layer."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    lost = torch.rand(999, select.LEVELS, generator=torch.Generator().manual_seed(0)).cumsum(1) / select.LEVELS
    lost[:, -1] = 1
    with Reads() as reads:
        kept, figures = select.settle(lost, 0.05, all_rows)
    assert reads.count == 0
    with reads:
        assert 0 < int(kept) < select.LEVELS - 1
    assert reads.count == 1
    mean = lost.double().mean(0)
    assert float(figures[0]) == pytest.approx(float(mean[int(kept) - 1]), rel=1e-5)
    assert float(figures[0]) <= float(figures[1]) <= 0.05
    nothing, figures = select.settle(lost + 0.06, 0.05, all_rows)
    assert (int(nothing), figures.tolist()) == (0, [0, 0])


def test_nothing_lost_is_the_dense_call():
    call = AttentionCall(*drawn("peaked"))
    assert torch.equal(attend(call, OPTIONS.but(lost_mass=0.0), {}, dense), dense(call))
    choice = choice_of(call, OPTIONS.but(lost_mass=1e-9))
    torch.testing.assert_close(dense(call.with_(blocks=choice.blocks)), dense(call))


@pytest.mark.parametrize(
    "rules",
    [{}, {"kv_start": torch.tensor([0, 70])}, {"q_offset": 100, "rows": 412}, {"kv_end": torch.tensor([512, 300])}],
    ids=str,
)
def test_the_chosen_blocks_are_computed_and_nothing_else(rules):
    rules = dict(rules)
    query, key, value = drawn("peaked", batch=2)
    query = query[:, :, : rules.pop("rows", LENGTH)].requires_grad_()
    call = AttentionCall(query, key, value, **rules)
    with recorded(measure=True) as reports:
        got = attend(call, LOOSE, {}, dense)
    choice = choice_of(call, LOOSE)
    wide = choice.blocks.seen(query.shape[2], LENGTH)
    want = dense(call.with_(bias=wide))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), query)[0] for out in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    (report,) = reports
    assert report.lost <= report.bound + 1e-5 <= 0.25 + 2e-5
    assert report.estimate == pytest.approx(report.lost, abs=1e-5)
    assert 0 < report.density < 1
    with recorded() as reports:
        attend(call, LOOSE, {}, dense)
    assert reports[0].lost is None


def test_other_calls_pass_unchanged():
    query, key, value = drawn("peaked")
    for rules in (
        {"causal": False},
        {"window": 50},
        {"softcap": 3.0},
        {"key_mask": torch.ones(1, LENGTH, dtype=torch.bool)},
    ):
        with recorded() as reports:
            attend(AttentionCall(query, key, value, **rules), OPTIONS, {}, dense)
        assert not reports
    for call in (AttentionCall(query[:, :, -1:], key, value, q_offset=LENGTH - 1), AttentionCall(*drawn("peaked"))):
        with recorded() as reports:
            attend(call, OPTIONS.but(min_keys=LENGTH), {}, dense)
        assert not reports


def test_a_long_prompt_is_sparse_and_its_continuation_dense():
    model = tiny_model("llama", max_position_embeddings=1024)
    tokens = torch.randint(8, 120, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), patch_model(model, "sparse", min_keys=100, block=32, lost_mass=0.2), recorded() as reports:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert [(report.rows, report.keys) for report in reports] == [(400, 400)] * 2
    assert all(report.bound <= 0.2 for report in reports)


def test_options_say_what_is_wrong_with_them():
    model = tiny_model("llama")
    for options, message in (
        ({"block": 48}, "power of two"),
        ({"samples": 3}, "power of two"),
        ({"lost_mass": 1.0}, "less than 1"),
        ({"bound": "soft"}, "sampled"),
    ):
        with pytest.raises(UsageError, match=message):
            patch_model(model, "sparse", **options)
