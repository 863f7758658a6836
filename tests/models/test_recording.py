"""Recorded GPU work: replayed as it was, and a recording that fails leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from rehead.models.recording import record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_recording_replays_on_what_its_memory_holds() -> None:
    x, stream = torch.ones(3, device="cuda"), torch.cuda.Stream()
    recording = record(lambda: 2 * x, stream)
    assert recording is not None
    graph, doubled = recording
    x.copy_(torch.tensor([1.0, 5.0, -2.0]))
    graph.replay()
    assert doubled.tolist() == [2, 10, -4]


def test_after_a_step_that_waits_for_the_gpu_everything_works_as_before() -> None:
    x, before = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    assert record(lambda: x * float(x.sum()), torch.cuda.Stream()) is None
    assert torch.cuda.current_stream() == before
    assert torch.randint(0, 300, (70,), device="cuda").max() < 300
    assert record(lambda: torch.rand(3, device="cuda"), torch.cuda.Stream()) is not None
