"""Attention kernels held to plain float64 attention: inputs, gradients and bounds that the kernel tests share."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from rehead.attention.blocks import KeyBlocks
from rehead.attention.kernels import attention, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON
needs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")


def segments(lengths: list[int], batch: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().repeat(batch, 1).to(DEVICE)


def holes(batch: int, count: int) -> torch.Tensor:
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[0, : count // 3] = False
    mask[-1, count // 2 : count // 2 + 5] = False
    return mask.to(DEVICE)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def some_blocks(batch: int, heads: int, num_q: int, num_k: int, rows: int = 16, keys: int = 16) -> KeyBlocks:
    """Random lists of key blocks, one of them empty."""
    shape = (batch, heads, -(-num_q // rows), -(-num_k // keys))
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    seen[0, 0, -1] = False
    return KeyBlocks.of(seen.to(DEVICE), rows, keys)


def draw(case: tuple, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], dict, torch.Tensor]:
    """Fresh inputs in transformers' layout ([B, S, heads, dim] memory, transposed) and the gradient of the output."""
    batch, heads, kv_heads, num_q, num_k, dim, dim_v, rules = case

    def make(seq: int, count: int, width: int) -> torch.Tensor:
        return torch.randn(batch, seq, count, width, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_()

    query, key, value = make(num_q, heads, dim), make(num_k, kv_heads, dim), make(num_k, kv_heads, dim_v)
    rules = {"scale": dim**-0.5, **rules}
    if "sinks" in rules:
        rules["sinks"] = rules["sinks"].clone().requires_grad_()
    grad = torch.randn(batch, num_q, heads, dim_v, device=DEVICE).to(dtype)
    return (query, key, value), rules, grad


def run(function, inputs, rules, grad) -> list[torch.Tensor]:
    leaves = [*inputs, *([rules["sinks"]] if "sinks" in rules else [])]
    out = function(*inputs, **rules)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def compare(case: tuple, dtype: torch.dtype, **extra) -> None:
    torch.manual_seed(0)
    agree(*draw(case, dtype), **extra)


def agree(inputs: tuple[torch.Tensor, ...], rules: dict, grad: torch.Tensor, **extra) -> None:
    """Output and every gradient within the dtype's bound of the reference's; ``extra`` goes to the kernels alone."""
    got = run(attention, inputs, rules | extra, grad)
    want = run(reference.attention, inputs, rules, grad)
    # float64 gradients of the reference are cast to the leaves' dtype by autograd; its own rounding is in the bound.
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[inputs[0].dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want):
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error < bound, f"{name}: relative error {error:.2e}"
