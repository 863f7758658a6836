"""The models of :mod:`rehead.benchmarks.engines.cases`, written to folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rehead.benchmarks.engines.cases import CASES, HEAD_DIM, HEADS, HIDDEN, LAYERS, Case
from rehead.convert import convert
from rehead.models.tiny import randomize
from rehead.recipes.pipeline.named_models import embedded_model, write_smollm2

# What every random model is given, of those names that its config has.
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM, "intermediate_size": 192, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Write the case's model below a folder and return where it is; made once.

    Args:
        name: a key of :data:`CASES`.
        folder: holds all cases.
    """
    case = CASES[name]
    out = folder / name / "model"
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    if case.convert is None:
        _random_model(case, out)
        return out
    source = _SOURCES.get(case.source, _random_model)(case, folder / name / "source")
    convert(source, out, **case.convert)
    return out


def _embedded(case: Case, out: Path) -> Path:
    return embedded_model()


def _smollm2(case: Case, out: Path) -> Path:
    # One copy for all cases that start from it.
    shared = out.parent.parent / "smollm2-source"
    if not shared.is_dir():
        write_smollm2(shared)
    return shared


def _chatglm2(case: Case, out: Path) -> Path:
    """A small random GLM under the names and in the layout that ChatGLM2 was published with."""
    made = _random_model(Case("glm", case.config), out.parent / "glm")
    stock, config = load_file(made / "model.safetensors"), json.loads((made / "config.json").read_text())
    tensors = {
        "transformer.embedding.word_embeddings.weight": stock["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": stock["model.norm.weight"],
        "transformer.output_layer.weight": stock["lm_head.weight"],
    }
    below = {"mlp.dense_h_to_4h": "mlp.gate_up_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
    below |= {"self_attention.dense": "self_attn.o_proj"}
    below |= {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for part in ("weight", "bias"):
            rows = [stock[f"{old}self_attn.{name}_proj.{part}"] for name in "qkv"]
            tensors[f"{new}self_attention.query_key_value.{part}"] = torch.cat(rows)
        tensors |= {f"{new}{name}.weight": stock[f"{old}{its}.weight"] for name, its in below.items()}
    published = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": HIDDEN, "num_layers": LAYERS,
        "num_attention_heads": HEADS, "kv_channels": HEAD_DIM, "ffn_hidden_size": config["intermediate_size"],
        "padded_vocab_size": config["vocab_size"], "seq_length": 256, "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "eos_token_id": 0,
    }  # fmt: skip
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(published))
    return out


_SOURCES: dict[str, Callable[[Case, Path], Path]] = {
    "embedded": _embedded,
    "smollm2": _smollm2,
    "chatglm2": _chatglm2,
}


def _random_model(case: Case, out: Path) -> Path:
    """A small model of the case's class with the embedded model's tokenizer, every parameter random, in float32."""
    import inspect

    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
    cls: Any = CONFIG_MAPPING[case.source]
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "attribute_map", {}))
    values = {key: value for key, value in COMMON.items() if key in known} | case.config
    config = cls(vocab_size=len(tokenizer), **values)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        randomize(model, seed=None, scale=0.8, redraw=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out
