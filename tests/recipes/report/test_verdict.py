"""The verdict: what a report says first, in words and by one rule."""

from __future__ import annotations

import math
from dataclasses import replace

import made
import pytest

from rehead.models.distance import RECOVERABLE, RULE, USABLE, judged
from rehead.recipes.evaluation_schema import CacheSize, KVCache
from rehead.recipes.report import Entry
from rehead.recipes.report.facts import summarise
from rehead.recipes.report.tables import overview
from rehead.recipes.report.verdict import verdict, worse


def test_an_uptraining_that_did_harm_is_called_so() -> None:
    pair = [Entry("a", made.evaluation(0.2, 1), "a", "converted"),
            Entry("b", made.evaluation(0.9, 1, tokens=1e6), "a", "uptrained")]  # fmt: skip
    assert "has made it worse" in dict(verdict([summarise(entry) for entry in pair]).points)["uptraining"]
    more = [Entry("c", made.evaluation(0.1, 2), "a", "converted"),
            Entry("d", made.evaluation(0.05, 2, tokens=1e6), "a", "uptrained")]  # fmt: skip
    points = dict(verdict([summarise(entry) for entry in (*pair, *more)]).points)
    assert "has made it worse" in points["cache of 5 MiB"]
    assert "has made it worse" not in points["cache of 10 MiB"]


def test_an_uptraining_that_reads_better_and_differs_more_is_not_called_worse() -> None:
    """As of longer texts, where the original is no measure."""
    before, after = (summarise(Entry("a", made.evaluation(kl, 1), "a", "converted")) for kl in (0.2, 0.9))
    after = replace(after, texts=[replace(text, perplexity=1.0) for text in after.texts])
    assert "has lowered the perplexity" in worse(after, before)
    assert "has made it worse" in worse(before, after)


def test_sizes_are_compared_where_they_were_measured() -> None:
    """A window that is full at 8,192 tokens, in a model whose KV heads stayed."""
    found = made.evaluation(0.02, 8)
    found.kv_cache = [
        KVCache(who=who, computed_bytes_per_token=100, measured_bytes_per_token=100, dtype="bfloat16",
                sizes=[CacheSize(context=n, computed_bytes=None, measured_bytes=100 * min(n, kept)) for n in contexts])
        for who, kept, contexts in (("model", 512, (1024, 8192, 32768)), ("baseline", 10**6, (1024, 8192)))
    ]  # fmt: skip
    summary = summarise(Entry("m", found))
    assert (summary.context, summary.saving, summary.kv_bytes_per_token) == (8192, 16, 100)
    assert verdict([summary]).headline.startswith("Usable: a KV cache 16 times smaller at 8,192 tokens at ×1.02")


@pytest.mark.parametrize(
    ("kl", "agreement", "word"),
    [(0.0, 1.0, "usable"), (0.1, 0.85, "usable"), (0.1, 0.8, "uptrain first"), (0.2, 0.9, "uptrain first"),
     (1.9, 0.4, "uptrain first"), (1.9, 0.2, "broken"), (2.1, 0.9, "broken"), (math.nan, 0.9, "broken"),
     (0.05, None, "usable")],
)  # fmt: skip
def test_one_rule_says_what_a_model_is_good_for(kl, agreement, word) -> None:
    assert judged(kl, agreement) == word


def test_the_rule_that_is_printed_is_the_rule_that_is_used() -> None:
    for (kl, agreement), word, beyond in (
        (USABLE, "usable", "uptrain first"),
        (RECOVERABLE, "uptrain first", "broken"),
    ):
        assert judged(kl, agreement) == word
        assert judged(kl * 1.001, agreement) == judged(kl, agreement * 0.999) == beyond
        assert f"{kl:g} nats" in RULE
        assert f"{agreement:.0%}" in RULE


def test_latents_are_told_as_latents() -> None:
    found = made.evaluation(0.4, 1, full=True)
    found.model.conversion = {"options": {"method": "mean", "latent": 128}, "latent": {"rank": 128, "rope_dims": 32}}
    summary = summarise(Entry("m", found))
    said = verdict([summary]).headline
    assert said.endswith("(8 KV heads to a latent of 128 numbers and a rotated key of 32).")
    assert "mean" not in said
    assert overview([summary]).rows[-1][-1] == "latent"


def test_changed_blocks_are_not_told_as_a_smaller_cache() -> None:
    entries = [
        Entry(
            f"layers {layers}, {stage}", made.evaluation(kl, 8, name=f"out/{layers}-{stage}"), f"layers {layers}", stage
        )
        for layers, kl in (("all", 0.9), ("4-7", 0.1))
        for stage in ("converted", "uptrained")
    ]
    said = verdict([summarise(entry) for entry in entries])
    assert said.headline.startswith("layers 4-7: ×1.11 the perplexity")
    assert said.headline.endswith("with the KV cache as it was (uptrain first).")
