"""Recall by distance: whole for a model that copies by construction, none behind a window."""

from __future__ import annotations

import pytest
import torch
from copying import copying

from rehead.errors import UsageError
from rehead.models.recall import BLOCK, KEY, LEAD, fitting, length_of, recall, recall_texts
from rehead.patches import patch_model

RUNNING = torch.randint(0, 300, (3000,), generator=torch.Generator().manual_seed(3))
WORDS = torch.arange(300, 500)


def texts(*distances, **options):
    return recall_texts(RUNNING, distances, words=WORDS, trials=2, **options)


def test_a_model_that_copies_recalls_at_every_distance():
    rows = recall(copying(), texts(9, 64, 300, 1500))
    assert [(row.kind, row.distance) for row in rows] == [(k, d) for d in (9, 64, 300, 1500) for k in ("copy", "pairs")]
    assert all(row.top1 == 1.0 for row in rows)
    assert [row.tokens for row in rows[2:4]] == [2 * (BLOCK - 1), 2 * (BLOCK // (KEY + 1))]


def test_behind_a_window_it_recalls_nothing():
    before = recall(copying(), texts(300))
    for window, top1 in ((301, 1.0), (299, 0.0), (64, 0.0)):
        copy = recall(copying(window), texts(300, kinds=("copy",)))[0]
        assert copy.top1 == pytest.approx(top1, abs=0.02)  # a guess may hit
        assert (copy.nll > before[0].nll + 1) == (top1 == 0)
    assert recall(copying(200), texts(300))[1].top1 < 0.1


def test_the_texts_are_what_they_say():
    for text in texts(40, 300, start=torch.tensor([7])):
        block = min(BLOCK, text.distance)
        row = text.tokens[0]
        assert row[0] == 7
        assert text.tokens.shape[1] <= 1 + length_of(text.distance)
        first, second = row[1 + LEAD :][:block], row[1 + LEAD + text.distance :]
        first = first[: len(second)]
        assert torch.equal(first.sort().values, second.sort().values)
        assert torch.equal(first, second) == (text.kind == "copy")
        assert torch.equal(text.answers[0], second[text.recalled])
        if text.kind == "pairs":
            pairs = {tuple(pair.tolist()) for pair in first.view(-1, KEY + 1)}
            assert pairs == {tuple(pair.tolist()) for pair in second.view(-1, KEY + 1)}
    assert torch.equal(texts(300)[0].tokens, texts(300)[0].tokens)
    assert not torch.equal(texts(300)[0].tokens, texts(300, seed=1)[0].tokens)


def test_distances_that_cannot_be():
    with pytest.raises(UsageError, match="distance of 5: must be 6 or more"):
        texts(5)
    model = copying()
    assert fitting([6, 1968, 1969, 5000], model) == [6, 1968]
    assert recall_texts(torch.arange(3), [20])[0].tokens.shape == (4, LEAD + 40)  # a text that is shorter than a block


def test_a_patch_is_measured_by_distance_and_without_its_sinks():
    model = copying()
    rows = RUNNING[:1200].view(2, -1)
    with patch_model(model, "window", size=100, sinks=4) as patch:
        measured = patch.measure(input_ids=rows)
        assert [(row.kind, row.distance) for row in measured.recall] == [
            ("copy", 50), ("pairs", 50), ("copy", 200), ("pairs", 200)
        ]  # fmt: skip
        # Words of a block are in the text too, so that some of its tokens follow from elsewhere.
        shares = [row.top1 / before.top1 for row, before in zip(measured.recall, measured.recall_original)]
        assert [share > 0.8 for share in shares] == [True, True, False, False]
        assert "copy at 200 " in str(measured)
        assert measured.ablated is not None
        assert f"{measured.ablated:.4f} without what it adds" in str(measured)
        (row, _) = patch.measure(input_ids=rows, distances=[150]).recall
        assert row.distance == 150
        with pytest.raises(UsageError, match="distance of 4000: the model has positions for 2048"):
            patch.measure(input_ids=rows, distances=[4000])
    with patch_model(model, "window", size=100) as patch:
        assert patch.measure(input_ids=rows).ablated is None
        assert patch.measure(input_ids=rows, distances=[]).recall == []


def test_what_sinks_are_worth_is_the_kl_without_them():
    model = copying()
    rows = RUNNING[:400].view(2, -1)
    with patch_model(model, "window", size=20) as patch:
        bare = patch.measure(input_ids=rows, distances=[]).kl
    with patch_model(model, "window", size=20, sinks=8) as patch:
        measured = patch.measure(input_ids=rows, distances=[])
    assert measured.ablated == pytest.approx(bare)
    assert measured.kl != measured.ablated
