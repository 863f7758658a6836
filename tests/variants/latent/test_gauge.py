"""The scales of a latent layer."""

from __future__ import annotations

import pytest
import torch
from stored_latent import out_of_lane

from rehead.variants.latent.gauge import NORM_EPS, into_lane, lane_weight


def rms_norm(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = z.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(z.dtype)


@pytest.mark.parametrize("largest", [1.0, 100.0, 10000.0])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)])
def test_the_norm_of_a_latent_in_its_lane_is_a_constant(dtype, allowed, largest) -> None:
    """For tokens far above the usual size too, up to what the formula says."""
    g = torch.Generator().manual_seed(0)
    down = torch.randn(32, 48, generator=g, dtype=torch.float64) / 48**0.5
    x = torch.randn(64, 48, generator=g, dtype=torch.float64) * largest**0.5
    rows, norm = into_lane(down, lane_weight(dtype))
    z = (x.to(dtype) @ rows.to(dtype).T).to(dtype)
    wanted = x @ down.T
    error = float((rms_norm(z, norm.to(dtype)).double() - wanted).norm() / wanted.norm())
    assert error < allowed + largest / lane_weight(dtype) ** 2
    assert bool((norm.to(dtype).double() == norm).all())
    assert torch.allclose(out_of_lane(rows, norm), down, rtol=1e-12)


def test_half_precision_gets_a_lane_that_it_can_store() -> None:
    weight = lane_weight(torch.float16)
    row = torch.full((1, 8), 0.05, dtype=torch.float64)
    small = into_lane(row, weight)[0].half().double()
    assert float((small / into_lane(row, weight)[0] - 1).abs().max()) < 1e-2
    assert 1 / (2 * weight**2) < 1e-2  # how far the norm is from a constant
    underflown = into_lane(row, lane_weight(torch.float32))[0].half()
    assert float((underflown.double() / into_lane(row, lane_weight(torch.float32))[0] - 1).abs().max()) > 0.1
