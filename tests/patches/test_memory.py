"""Comparing logits takes little memory with a vocabulary of 262,144: random weights of Gemma 3 270M's shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from rehead.models.tiny import randomize
from rehead.recipes.pipeline.named_models import embedded_model

LIMIT = 1.5e9

LOAD = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
from rehead.patches import patch_model

def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    return model, sum(weight.nbytes for weight in model.parameters())
"""
WORK = {
    "prove": "model, size = load(); patch_model(model, 'tiled').apply().prove()",
    "measure": "model, size = load(); patch_model(model, 'window', size=64).apply().measure(length=1024)",
    "report": "model, size = load(); patch_model(model, 'parallel').apply().report()",
    "evaluate": "from rehead.recipes import evaluate; size = 0\n"
    "evaluate(sys.argv[1], data=['built-in:heldout'], tokens=8192, speed=False)",
    "compared": "from rehead.recipes import evaluate; size = 0\n"
    "evaluate(sys.argv[1], baseline=sys.argv[1], data=['built-in:heldout'], tokens=8192, speed=False)",
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of Gemma 3 270M's shape in float32, with the tokenizer of the small model that ships."""
    out = tmp_path_factory.mktemp("gemma")
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512, layer_types=kinds,
            max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    randomize(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORK)
def test_a_large_vocabulary_takes_little_memory(gemma: Path, name: str) -> None:
    script = LOAD + WORK[name] + "\nprint(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    # A child's peak starts from its parent's memory, so a small process starts it.
    words = f"[sys.executable, '-c', {script!r}, {str(gemma)!r}]"
    starter = f"import subprocess, sys; sys.exit(subprocess.run({words}).returncode)"
    done = subprocess.run([sys.executable, "-S", "-c", starter], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, peak = map(int, done.stdout.split()[-2:])
    weights = sum(path.stat().st_size for path in gemma.glob("*.safetensors"))
    assert size in (0, weights) or abs(size - weights) < 1e6
    assert peak - weights * (2 if name == "compared" else 1) < LIMIT, f"{peak / 1e9:.2f} GB at its peak"
