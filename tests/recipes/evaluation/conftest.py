"""A small original with a tokenizer, conversions of it, and models that copy by construction."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

from rehead.convert import convert
from rehead.models.tiny import randomize
from rehead.recipes.scratch import NewModel, new_model

WORDS = ("peace", "commerce", "a treaty with the United Kingdom", "revenues beyond all expectation")
LINES = [f"The year {year} brought {year * 7} bales and {word}." for year in range(1790, 1890) for word in WORDS]
SHAPE = NewModel(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def text(place) -> Path:
    file = place / "text.txt"
    file.write_text("\n".join(LINES[:120]))
    return file


@pytest.fixture(scope="session")
def original(place) -> Path:
    """A checkpoint with weights large enough that heads and layers matter."""
    out = new_model(place / "original", LINES, SHAPE)
    model = randomize(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), seed=1)
    with torch.no_grad():  # logits of a sane size
        model.model.norm.weight.mul_(0.25)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def converted(place, original) -> Path:
    """The original with one KV head in place of four."""
    convert(original, place / "converted", num_key_value_heads=1)
    return place / "converted"


@pytest.fixture(scope="session")
def control(place, original) -> Path:
    """The original moved a little, as training on a text would."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    out = place / "control"
    shutil.copytree(original, out)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tokenizer(original):
    return AutoTokenizer.from_pretrained(original, model_max_length=10**9)


@pytest.fixture(scope="session")
def tokens(text, tokenizer) -> torch.Tensor:
    return torch.tensor(tokenizer(text.read_text()).input_ids)


@pytest.fixture(scope="session")
def load():
    """A live model from a folder."""
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


VOCABULARY, CODE = 512, 64


def _copying_model(window: int | None = None):
    """A real LLaMA (or, with a window, a Mistral that sees only so far back) that copies by construction.

    Hidden states are four blocks of 64: the token's own code, the code of the token before it, what is to be said, and
    a constant. The first layer's queries and keys are constants whose rotary phases agree one token back, so it writes
    the previous token's code. The second matches the own code against previous codes, in rotary pairs that hardly turn,
    and writes the code of the token that it finds: an induction head (arXiv 2209.11895). There is nothing else in it.
    """
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 4 * CODE, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2 * CODE, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e8}, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-8, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = Mistral(MistralConfig(**shape, sliding_window=window))
    codes = torch.nn.functional.normalize(
        torch.randn(VOCABULARY, CODE, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    own, before, said, constant = (slice(at * CODE, (at + 1) * CODE) for at in range(4))
    still = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])  # dimensions of the pairs that hardly turn
    angles = 1e8 ** (-torch.arange(64) / 64)
    first, second = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.zero_()
        model.model.embed_tokens.weight[:, own] = codes
        model.model.embed_tokens.weight[:, constant.start] = 1.0
        turning = torch.arange(16)
        first.q_proj.weight[turning, constant.start] = 1.7 * torch.cos(angles[turning])
        first.q_proj.weight[turning + 64, constant.start] = -1.7 * torch.sin(angles[turning])
        first.k_proj.weight[turning, constant.start] = 1.7
        first.v_proj.weight[:CODE, own] = torch.eye(CODE)
        first.o_proj.weight[before, :CODE] = torch.eye(CODE) / 128**0.5  # undoes the norm before the layer
        second.q_proj.weight[still, own] = 3 * torch.eye(CODE)
        second.k_proj.weight[still, before] = 3 * torch.eye(CODE)
        second.v_proj.weight[:CODE, own] = torch.eye(CODE)
        second.o_proj.weight[said, :CODE] = torch.eye(CODE)
        model.lm_head.weight[:, said] = codes
    return model.eval()


@pytest.fixture(scope="session")
def copying_model():
    """Makes a model that copies by construction, with a window or without."""
    return _copying_model
