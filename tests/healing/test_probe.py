"""The attention function that shows what it computes."""

from __future__ import annotations

import threading

import torch
from torch import nn

from rehead.models.watch import Seen, observing, probe_attention


def look(seed: int, ready: threading.Barrier, observed: dict[int, list[Seen]]) -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)).unbind(0)
    with observing(observed[seed].append, torch.tensor([seed])):
        ready.wait()
        probe_attention(nn.Identity(), query, key, value, None)


def test_conversions_in_two_threads_see_their_own_attention() -> None:
    ready = threading.Barrier(2)
    observed: dict[int, list[Seen]] = {2: [], 4: []}
    threads = [threading.Thread(target=look, args=(seed, ready, observed)) for seed in observed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, seen in observed.items():
        assert len(seen) == 1
        # The query at position `seed` sees the keys up to there.
        assert int(seen[0].visible.sum()) == seed + 1
