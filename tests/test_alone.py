"""Commands in a process of their own: what other tests have imported or registered is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_alone(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--window", "64", "--layers", "auto:50%"],
        ["--block", "parallel", "--layers", "auto:50%"],
    ],
    ids=["window", "block"],
)
def test_layers_are_chosen_in_a_process_of_its_own(options, tmp_path):
    done = run_alone("-m", "rehead.cli", "convert", "embedded", str(tmp_path / "out"), "--quiet", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_variant_is_put_on_where_nobody_has_imported_patches():
    code = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from rehead.attention.install import Installation
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2)).eval()
Installation(model).enter()
model(torch.arange(8)[None])
assert "rehead.patches" not in sys.modules
"""
    done = run_alone("-c", code)
    assert done.returncode == 0, done.stderr
