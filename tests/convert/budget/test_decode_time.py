"""The time of attention in decoding: the call reads what the layout caches, each layout is timed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rehead.attention.attend import attend
from rehead.convert.budget import decode_time
from rehead.convert.budget.decode_time import DecodeTimes, decode_call
from rehead.models.layout import LayerLayout

CPU = torch.device("cpu")
WHOLE = LayerLayout(0, num_heads=8, num_key_value_heads=4, key_dim=16, value_dim=16, itemsize=4)
LAYOUTS = {
    "grouped": WHOLE,
    "one head": replace(WHOLE, num_key_value_heads=1),
    "unequal groups": replace(WHOLE, num_key_value_heads=3),
    "window": replace(WHOLE, window=33, sinks=4),
    "latent": replace(WHOLE, num_key_value_heads=1, key_dim=40, value_dim=0, reads=2 * 32 + 8),
    "wider values": replace(WHOLE, value_dim=24),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_reads_the_cache_that_the_layout_counts(name):
    layout, batch, context = LAYOUTS[name], 3, 200
    call = decode_call(layout, context, batch, CPU)
    stored = [call.key] + [part for part in (call.key_tail,) if part is not None]
    stored += [] if call.key_tail is not None else [call.value]
    assert sum(part.nbytes for part in stored) == batch * layout.cache_bytes(context)
    assert call.query.shape[1] >= layout.num_heads
    assert attend(call).isfinite().all()


def test_every_layout_is_timed_once_and_a_layer_without_attention_never(monkeypatch):
    timed = []

    def seconds(call, device):
        timed.append(call.key.shape)
        return 1.0

    monkeypatch.setattr(decode_time, "seconds", seconds)
    times = DecodeTimes(100, 2, CPU)
    layers = [replace(LAYOUTS[name], index=at) for at, name in enumerate(("grouped", "grouped", "window", "grouped"))]
    assert times.total([*layers, LayerLayout(4, 0, 0, 0, 0, fixed=64)]) == 4.0
    assert timed == [(2, 4, 100, 16), (2, 4, 36, 16)]


def test_seconds_are_those_of_one_run(monkeypatch):
    """A clock on which each attention takes a known time; measurements repeat it as often as the clock needs."""
    now = [0.0]

    def attended(call):
        now[0] += 3e-4

    monkeypatch.setattr(decode_time, "attend", attended)
    monkeypatch.setattr(decode_time, "clock", lambda device: now[0])
    assert decode_time.seconds(decode_call(WHOLE, 16, 1, CPU), CPU) == pytest.approx(3e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LAYOUTS)
def test_times_on_a_gpu(name):
    layout = replace(LAYOUTS[name], itemsize=2)
    taken = DecodeTimes(4096, 8, torch.device("cuda", 0)).of(layout)
    assert 1e-7 < taken < 1e-2
