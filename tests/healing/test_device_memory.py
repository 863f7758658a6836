"""A conversion keeps to the memory that it may use, and its result does not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from rehead.checkpoints.shards import parse_size
from rehead.cli import cli
from rehead.convert import convert
from rehead.errors import UsageError
from rehead.healing import layer as layer_recovery
from rehead.healing import run as whole_run
from rehead.models.device_memory import empty_beside, free_memory, in_host_memory, memory_limited

TEXT = {"calibration": ["random"], "calibration_tokens": 4096, "calibration_length": [32, 64]}
FORMS = {"svd": {"num_key_value_heads": 1, "method": "svd"}, "latent": {"latent": 16, "rope_dims": 4}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save_tiny("llama-mha", tmp_path_factory.mktemp("models") / "llama-mha")


def test_a_limit_is_for_a_gpu_and_written_as_a_size(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cpu is no GPU"), memory_limited(torch.device("cpu"), 1 << 30):
        pass
    with memory_limited(torch.device("cpu"), None):
        pass
    assert parse_size("1.5GiB", "--device-memory") == 3 << 29
    for size in ("much", "-1GB", "0"):
        asked = ["convert", str(source), str(tmp_path / "out"), "--kv-heads", "1", "--device-memory", size]
        said = CliRunner().invoke(cli, [*asked, "--device", "cpu"])
        assert isinstance(said.exception, UsageError)
        assert "--device-memory" in str(said.exception)


def test_copies_in_host_memory_equal_what_they_copy() -> None:
    tensor = torch.randn(3, 4, 5)
    copy = in_host_memory(tensor)
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()
    beside = empty_beside(tensor, (2, 7))
    assert beside.shape == (2, 7)
    assert (beside.dtype, beside.device) == (tensor.dtype, tensor.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_free_is_within_the_limit() -> None:
    device, limit = torch.device("cuda"), 1 << 30
    total = torch.cuda.get_device_properties(device).total_memory
    with memory_limited(device, limit):
        assert free_memory(device) <= limit
        held = torch.empty(limit // 2, dtype=torch.uint8, device=device)
        assert free_memory(device) <= limit - held.nbytes
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(limit, dtype=torch.uint8, device=device)
    assert torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device()) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="ask for no more"), memory_limited(device, total + 1):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("free", [1 << 30, 3_000_000, 0], ids=["float32", "bfloat16", "each step"])
def test_text_in_host_memory_gives_the_same_layers(source, tmp_path, monkeypatch, form, free) -> None:
    asked = {**FORMS[form], **TEXT, "refit": True, "fit": 20, "device": "cuda"}
    on_gpu = convert(source, tmp_path / "on_gpu", **asked)
    monkeypatch.setattr(whole_run, "free_memory", lambda device: 0)
    monkeypatch.setattr(layer_recovery, "free_memory", lambda device: free)
    brought = []
    original = layer_recovery._brought

    def watched(*args):
        assert all(part.is_pinned() for part in args[0])
        inputs, target = original(*args)
        brought.append(inputs[0].dtype if inputs[0].is_cuda else None)
        return inputs, target

    monkeypatch.setattr(layer_recovery, "_brought", watched)
    in_host = convert(source, tmp_path / "in_host", **asked)
    assert set(brought) == {{1 << 30: torch.float32, 3_000_000: torch.bfloat16, 0: None}[free]}
    errors = ("key_error", "value_error", "logit_error", "fit_loss", "output_error", "block_error", "lost")
    for layer, facts in on_gpu.layers.items():
        compared = [name for name in errors if name in facts]
        assert len(compared) > 1
        for name in compared:
            assert in_host.layers[layer][name] == pytest.approx(facts[name], rel=1e-2, abs=1e-3), (layer, name)
