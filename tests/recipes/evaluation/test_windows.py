"""Every convention counts what it says, once, from the context that it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.errors import UsageError
from rehead.recipes.evaluation.windows import batches, cut, disjoint, rolling, strided

SIZES = {"total": st.integers(2, 300), "window": st.integers(2, 64)}


def counted(windows) -> list[int]:
    return [at for window in windows for at in range(window.end - window.counted, window.end)]


@given(**SIZES)
@settings(max_examples=80, deadline=None)
def test_disjoint_counts_all_but_the_first_of_whole_windows(total, window):
    found = disjoint(total, window)
    whole = total // window * window
    assert counted(found) == [at for at in range(whole) if at % window]


@given(**SIZES, data=st.data())
@settings(max_examples=80, deadline=None)
def test_strided_counts_every_token_but_the_first_once(total, window, data):
    stride = data.draw(st.integers(1, window))
    found = strided(total, window, stride)
    # Windows that do not overlap have a first token each.
    firsts = set(range(0, total, window)) if stride == window else {0}
    assert counted(found) == [at for at in range(total) if at not in firsts]
    for part in found:
        assert part.end - part.start <= window
        assert part.start % stride == 0


@given(**SIZES)
@settings(max_examples=80, deadline=None)
def test_rolling_counts_every_token_behind_the_prefix_once(total, window):
    found = rolling(total, window)
    assert counted(found) == list(range(1, total))
    for part in found:
        assert part.end - part.start == min(window + 1, total)


@given(**SIZES, convention=st.sampled_from(["strided", "rolling"]), size=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_batches_hold_the_windows_in_order(total, window, convention, size):
    tokens = torch.arange(total)
    windows = cut(convention, total, window)
    rows = [(i, t) for inputs, targets in batches(tokens, windows, size) for i, t in zip(inputs, targets)]
    assert len(rows) == len(windows)
    for part, (inputs, targets) in zip(windows, rows):
        assert inputs.tolist() == list(range(part.start, part.end - 1))
        assert targets.tolist() == list(range(part.end - part.counted, part.end))
        assert part.counted <= len(inputs)


def test_what_cannot_be_cut_is_one_line():
    with pytest.raises(UsageError, match="shorter than one window of 64"):
        cut("disjoint", 63, 64)
    with pytest.raises(UsageError, match="did you mean 'strided'"):
        cut("stride", 100, 64)
