"""The order of rows: every row once an epoch, a function of (seed, step) and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.data.order import permuted, rows_of_step


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_it_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, seed, epoch)) == list(range(size))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(permuted(np.arange(100), 100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    mixed = permuted(np.arange(20000), 20000, 0, 0)
    assert abs(np.corrcoef(np.arange(20000), mixed)[0, 1]) < 0.03
    assert np.abs(np.diff(mixed)).mean() == pytest.approx(20000 / 3, rel=0.05)


@given(size=st.integers(1, 200), rows=st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_steps_go_through_epochs_without_a_gap(size: int, rows: int, seed: int) -> None:
    steps = -(-3 * size // rows)
    seen = np.concatenate([rows_of_step(step, rows, size, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    # Any step can be asked for by itself.
    assert (rows_of_step(steps - 1, rows, size, seed) == seen[-rows:]).all()
