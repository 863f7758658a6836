"""A GPU on which other processes compute: the Hopper kernels stand back, and attention stays right."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rehead.attention.kernels import device as module

GPU = torch.cuda.is_available()
CUDA = torch.device("cuda", 0)


class _Driver:
    """Stands in for NVIDIA's library: knows one GPU and how many processes compute on it."""

    def __init__(self, processes: int) -> None:
        self.processes, self.asked = processes, 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):  # noqa: N802 - NVIDIA's names
        return 0 if name == b"GPU-1234" else 6

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, room):  # noqa: N802
        self.asked += 1
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = self.processes
        return 7 if self.processes else 0


@pytest.fixture
def driver(monkeypatch):
    fake = _Driver(1)
    monkeypatch.delenv(module.ALONE, raising=False)
    monkeypatch.setattr(module, "_last", {})
    monkeypatch.setattr(module, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return fake


@pytest.mark.parametrize(("processes", "answer"), [(0, True), (1, True), (2, False), (5, False)])
def test_alone_is_what_the_driver_says(processes, answer, driver):
    driver.processes = processes
    assert module.alone(CUDA) is answer


def test_the_driver_is_asked_again_after_a_while_and_the_change_said_once(driver, monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.WARNING, logger="rehead.attention")
    assert module.alone(CUDA)
    driver.processes = 2
    assert module.alone(CUDA)  # as it was a moment ago
    assert driver.asked == 1
    clock[0] += 5
    assert not module.alone(CUDA)
    clock[0] += 5
    assert not module.alone(CUDA)
    assert [record.message.count("another process") for record in caplog.records] == [1]
    driver.processes = 1
    clock[0] += 5
    assert module.alone(CUDA)


def test_the_user_may_know_better(driver, monkeypatch):
    driver.processes = 2
    monkeypatch.setenv(module.ALONE, "1")
    assert module.alone(CUDA)
    assert driver.asked == 0


@pytest.mark.parametrize("code", [None, 0, 6])
def test_without_an_answer_a_process_is_alone(code, driver, monkeypatch):
    """No library; one that does not know the second call; one that does not know the GPU."""
    nobody = None if code is None else SimpleNamespace(nvmlDeviceGetHandleByUUID=lambda name, handle: code)
    monkeypatch.setattr(module, "_driver", lambda: nobody)
    assert module.alone(CUDA)


def test_a_system_without_the_library_has_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", missing)
    assert module._driver.__wrapped__() is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_hopper_kernels_stand_back(driver, monkeypatch):
    hopper = pytest.importorskip("rehead.attention.kernels.hopper")
    if not hopper.READY:
        pytest.skip("this Triton release has no Hopper kernels")
    from rehead.attention.call import AttentionCall

    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "interpreting", lambda: False)
    plain = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    call = AttentionCall(plain, plain, plain, scale=1.0, causal=True)
    latents, tail = torch.zeros(1, 1, 256, 512, dtype=torch.bfloat16), torch.zeros(1, 1, 256, 64, dtype=torch.bfloat16)
    query = torch.zeros(1, 8, 1, 576, dtype=torch.bfloat16)
    step = AttentionCall(query, latents, latents, scale=1.0, causal=True, q_offset=255, key_tail=tail)
    assert hopper.takes(call)
    assert hopper.takes_latents(step)
    module._last.clear()
    driver.processes = 2
    assert "another process" in hopper.refusal(call)
    assert not hopper.takes_latents(step)


_BESIDE_OTHERS = """
import time, torch
from rehead.attention.call import AttentionCall
from rehead.attention.kernels import api, general

torch.manual_seed(0)
query, key, value = (
    torch.randn(4, 8192, heads * 64, device="cuda", dtype=torch.bfloat16).view(4, 8192, heads, 64).transpose(1, 2)
    for heads in (9, 3, 3)
)
call = AttentionCall(query, key, value, causal=True, scale=0.25)
want, until, worst = general.forward(call)[0], time.time() + 20, 0.0
while time.time() < until:
    for _ in range(10):
        worst = max(worst, float((api.run(call)[0].float() - want.float()).abs().max()))
print(worst)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_attention_is_right_where_three_processes_take_turns():
    own = {name: value for name, value in os.environ.items() if name != module.ALONE}
    running = [
        subprocess.Popen([sys.executable, "-c", _BESIDE_OTHERS], env=own, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    worst = [float(process.communicate(timeout=300)[0].split()[-1]) for process in running]
    assert max(worst) < 0.05
