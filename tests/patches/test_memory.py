"""Comparing logits takes little memory with a vocabulary of 262,144: random weights of Gemma 3 270M's shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from rehead.models.tiny import randomize
from rehead.recipes.pipeline.named_models import embedded_model

LIMIT = 1.5e9

LOAD = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
from rehead.patches import patch_model

def load():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
"""
WORK = {
    "prove": "model = load(); patch_model(model, 'tiled').apply().prove()",
    "measure": "model = load(); patch_model(model, 'window', size=64).apply().measure(length=1024)",
    "blocks": "model = load(); patch_model(model, 'parallel').apply().report()",
    "evaluate": "from rehead.recipes import evaluate\n"
    "evaluate(sys.argv[1], data=['built-in:heldout'], tokens=8192, speed=False)",
    "compared": "from rehead.recipes import evaluate\n"
    "evaluate(sys.argv[1], baseline=sys.argv[1], data=['built-in:heldout'], tokens=8192, speed=False)",
}


SHAPE = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models in float32 with a tokenizer: Gemma's class, and LLaMA's, whose blocks can be parallel."""
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    windows = {"query_pre_attn_scalar": 256, "sliding_window": 512, "layer_types": kinds}
    torch.manual_seed(0)
    made = {}
    for name, build in (
        ("gemma", lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **windows))),
        ("llama", lambda: LlamaForCausalLM(LlamaConfig(**SHAPE))),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        randomize(build()).save_pretrained(made[name])
        AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(made[name])
    return made


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORK)
def test_a_large_vocabulary_takes_little_memory(folders: dict[str, Path], name: str) -> None:
    folder = folders["llama" if name == "blocks" else "gemma"]
    script = LOAD + WORK[name] + "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    # A child's peak starts from its parent's memory, so a small process starts it.
    words = f"[sys.executable, '-c', {script!r}, {str(folder)!r}]"
    starter = f"import subprocess, sys; sys.exit(subprocess.run({words}).returncode)"
    done = subprocess.run([sys.executable, "-S", "-c", starter], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert peak - weights * (2 if name == "compared" else 1) < LIMIT, f"{peak / 1e9:.2f} GB at its peak"
