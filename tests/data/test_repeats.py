"""Texts that repeat stretches of themselves: what repeats, where, and what a model learns from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from copying import copying
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.data.calibration import CalibrationText
from rehead.data.repeats import LONGEST, SHORTEST, _stretches, repeating, with_repeats
from rehead.data.store import IGNORED, Rows, TokenStore
from rehead.recipes.training.options import _REPEATING


def _store(folder, documents: list[int], start: int) -> TokenStore:
    """A store of documents of so many tokens, each begun by tokens 1 to ``start``; all others are distinct."""
    bodies = iter(range(1000, 10_000_000))
    parts = [[*range(1, start + 1), *(next(bodies) for _ in range(size))] for size in documents]
    tokens = np.concatenate([np.asarray(part, dtype="uint32") for part in parts])
    begins = np.cumsum([0, *map(len, parts)])[:-1].astype("<i8")
    tokens.tofile(folder / "tokens.raw")
    begins.tofile(folder / "documents.raw")
    facts = {"key": "", "dtype": "uint32", "tokens": len(tokens), "documents": len(parts), "sha256": ""}
    (folder / "tokens.json").write_text(json.dumps(facts))
    return TokenStore(folder, torch.arange(1, start + 1))


def _distinct(count: int, length: int) -> Rows:
    tokens = torch.arange(count * (length + 1)).view(count, length + 1)
    return Rows(tokens[:, :-1], torch.arange(length).expand(count, -1), tokens[:, 1:])


def test_every_fourth_long_sequence_of_calibration_ends_with_stretches_of_itself() -> None:
    """Of distinct tokens, so that whatever appears twice was repeated."""
    before = CalibrationText([torch.arange(6 * 1024).view(6, 1024), torch.arange(5 * 512).view(5, 512)], ["text"])
    kept = [part.clone() for part in before.tokens]
    after = repeating(before, seed=3)
    assert all(torch.equal(*pair) for pair in zip(kept, before.tokens))
    assert torch.equal(after.tokens[1], kept[1])
    assert after.tokens[0].shape == kept[0].shape
    assert after.names == before.names
    for index, row in enumerate(after.tokens[0]):
        assert torch.equal(row[:768], kept[0][index, :768])
        if index % 4:
            assert torch.equal(row, kept[0][index])
            continue
        for stretch in row[768:].split(64):
            assert stretch[0] in row[: 768 - 63]
            assert torch.equal(stretch, stretch[0] + torch.arange(64))
    assert torch.equal(repeating(before, seed=3).tokens[0], after.tokens[0])
    assert not torch.equal(repeating(before, seed=4).tokens[0], after.tokens[0])


@given(
    sizes=st.lists(st.integers(1, 900), min_size=2, max_size=12), length=st.integers(8, 700), start=st.integers(0, 2),
    isolated=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_copies_stay_in_their_document_and_labels_follow(
    tmp_path_factory, sizes: list[int], length: int, start: int, isolated: bool, seed: int
) -> None:
    store = _store(tmp_path_factory.mktemp("store"), [*sizes, 2 * length], start)
    count = store.rows(length)
    before = store.read(np.arange(count), length, isolated=isolated)
    kept = [part.clone() for part in before]
    after = with_repeats(before, np.arange(count), 1.0, seed, start)
    assert all(torch.equal(*pair) for pair in zip(kept, before))
    assert torch.equal(after.position_ids, before.position_ids)
    for old, new, labels, old_labels, positions in zip(
        before.input_ids, after.input_ids, after.labels, before.labels, before.position_ids
    ):
        # A row's first tokens were put there for its start; what came before them is no matter of this.
        assert torch.equal(new[: max(start, 1)], old[: max(start, 1)])
        assert labels[-1] == old_labels[-1]
        counted = (labels[:-1] != IGNORED) & (torch.arange(1, length) >= start)
        assert torch.equal(labels[:-1][counted], new[1:][counted])
        assert not (start and (labels[:-1][counted] == 1).any())  # where a document begins is not foretold
        if isolated:
            assert torch.equal(labels == IGNORED, old_labels == IGNORED)
        place = {int(token): at for at, token in enumerate(old) if token >= 1000}
        for at in (new != old).nonzero().flatten().tolist():
            if isolated:
                assert positions[at] >= max(start, 1)
            if int(new[at]) >= 1000:
                source = place[int(new[at])]
                assert source < at
                if isolated:  # in the same document: as far back as the positions say, or less
                    assert at - source < positions[at]
            else:
                assert not isolated


@given(begin=st.integers(0, 9), length=st.integers(0, 5000), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_stretches_do_not_overlap_and_are_found_whole(begin: int, length: int, seed: int) -> None:
    stretches = list(_stretches(begin, begin + length, np.random.default_rng(seed)))
    assert bool(stretches) == (length >= 4 * SHORTEST)
    done = begin
    for at, distance, size in stretches:
        assert SHORTEST <= size <= LONGEST
        assert at >= done
        assert size <= distance <= at - begin
        done = at + size
    assert done <= begin + length
    tokens = _distinct(1, begin + length + 1)
    after = with_repeats(tokens, np.array([seed]), 1.0, 0, begin).input_ids[0]
    for at, distance, size in _stretches(max(begin, 1), begin + length, np.random.default_rng([0, seed])):
        assert torch.equal(after[at : at + size], after[at - distance : at - distance + size])


def test_rows_that_options_take_repeat_something_and_shorter_ones_nothing() -> None:
    for length in (_REPEATING - 1, _REPEATING):
        rows = _distinct(1, length)
        same = torch.equal(with_repeats(rows, np.array([0]), 1.0, 0).input_ids, rows.input_ids)
        assert same == (length < _REPEATING)


def test_distances_cover_the_whole_row() -> None:
    length = 4096
    rows = [_stretches(1, length, np.random.default_rng(i)) for i in range(100)]
    distances = np.array([distance for row in rows for _, distance, _ in row])
    shares = np.histogram(distances, 10, (0, length))[0] / len(distances)
    assert (shares > 0.05).all()
    assert distances.max() > 0.97 * length


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.7, 1.0])
def test_the_share_of_rows_holds_everywhere_and_the_others_stay(share: float) -> None:
    rows = _distinct(200, 128)
    for first in (0, 1_000_003):
        after = with_repeats(rows, np.arange(first, first + 200), share, 0)
        changed = (after.input_ids != rows.input_ids).any(1)
        for low in range(0, 200, 20):  # in every stretch of the order, not in all of it alone
            assert abs(int(changed[low : low + 20].sum()) - share * 20) <= 1
        assert torch.equal(after.labels[~changed], rows.labels[~changed])


def test_what_repeats_depends_on_seed_and_place_alone() -> None:
    rows, places = _distinct(8, 512), np.arange(40, 48)
    whole = with_repeats(rows, places, 0.75, 5)
    parts = [with_repeats(Rows(*(x[at : at + 1] for x in rows)), places[at : at + 1], 0.75, 5) for at in range(8)]
    for i, part in enumerate(whole):
        assert torch.equal(part, torch.cat([row[i] for row in parts]))
    assert not torch.equal(whole.input_ids, with_repeats(rows, places, 0.75, 6).input_ids)
    assert not torch.equal(whole.input_ids, with_repeats(rows, places + 512, 0.75, 5).input_ids)


def test_a_model_that_copies_from_near_learns_to_copy_from_afar() -> None:
    """Trained on words without any order, where nothing but a repeated stretch can be foretold."""
    length, distance, block = 768, 600, 64
    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(8, 512, (2, length), generator=draw)
    first, second = slice(64, 64 + block), slice(64 + distance, 64 + distance + block)
    asked[:, second] = asked[:, first]
    copied = {}
    for share in (0.0, 1.0):
        model = copying(local=True)
        model.lm_head.weight.data *= 0.3  # less sure of itself, or what cannot be foretold is all that it learns from
        layer = model.model.layers[1].self_attn
        optimizer = torch.optim.Adam([layer.q_proj.weight, layer.k_proj.weight], lr=0.05)
        words = torch.Generator().manual_seed(1)
        for step in range(45):
            tokens = torch.randint(8, 512, (2, length + 1), generator=words)
            rows = Rows(tokens[:, :-1], torch.arange(length).expand(2, -1), tokens[:, 1:])
            rows = with_repeats(rows, np.arange(2 * step, 2 * step + 2), share, 0)
            logits = model(rows.input_ids).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten()).backward()
            optimizer.step()
        with torch.no_grad():
            said = model(asked).logits.argmax(-1)[:, second][:, :-1]
        copied[share] = float((said == asked[:, second][:, 1:]).double().mean())
    assert copied[1.0] > 0.3
    assert copied[0.0] < 0.02
