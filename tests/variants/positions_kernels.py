"""Dual chunks and Self-Extend through the GPU kernels; on machines without one by Triton's interpreter."""

import math

import pytest
import torch

from rehead.attention import attend as attending
from rehead.attention import kernels
from rehead.attention.call import AttentionCall
from rehead.models.rotation import Turn
from rehead.variants import dual_chunk, self_extend
from rehead.variants.positions import Placed

ANGLES = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def through_kernels(compute, call):
    out, lse = kernels.run(call)
    return out, (lse * math.log(2)).masked_fill(lse == float("inf"), float("-inf"))


@pytest.mark.parametrize("rows", [100, 3])
@pytest.mark.parametrize(("variant", "cls", "told"), [
    (dual_chunk, dual_chunk.DualChunkOptions, {"trained": 40, "chunk": 30}),
    (dual_chunk, dual_chunk.DualChunkOptions, {"trained": 40, "chunk": 16}),
    (self_extend, self_extend.SelfExtendOptions, {"trained": 40, "group": 4, "neighbours": 12}),
])  # fmt: skip
def test_kernels_compute_what_the_cpu_does(variant, cls, told, rows, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, rows, 16, generator=draw)
    key, value = (torch.randn(1, 2, 100, 16, generator=draw) for _ in range(2))
    call = AttentionCall(query, key, value, q_offset=100 - rows)
    options = Placed(cls.parse(told), told["trained"], Turn(ANGLES))
    want = variant.attend(call, options, {}, attending.attend)
    monkeypatch.setattr(variant, "with_lse", through_kernels)
    moved = call.with_(**{name: getattr(call, name).to(DEVICE) for name in ("query", "key", "value")})
    got = variant.attend(moved, options, {}, lambda part: kernels.run(part)[0]).cpu()
    torch.testing.assert_close(got, want, atol=2e-3 if DEVICE == "cuda" else 1e-5, rtol=1e-3)
