"""Small checkpoints made by hand for the tests of reading and writing; no model class is needed to write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rehead.checkpoints.safetensors_io import header_bytes

CODES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.float64: "F64",
}


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, tensors in the order given."""
    head = header_bytes(
        ((k, CODES[v.dtype], tuple(v.shape)) for k, v in tensors.items()),
        {"format": "pt"} if metadata is None else metadata,
    )
    with open(path, "wb") as f:
        f.write(head)
        for v in tensors.values():
            f.write(v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def llama_tensors(layers: int = 2, hidden: int = 64, heads: int = 4, inner: int = 96, vocab: int = 50, seed: int = 0):
    """The tensors of a LLaMA of these sizes, BF16."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * 0.05).to(torch.bfloat16)

    out = {"model.embed_tokens.weight": r(vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = r(hidden)
        out[p + "mlp.down_proj.weight"] = r(hidden, inner)
        out[p + "mlp.gate_proj.weight"] = r(inner, hidden)
        out[p + "mlp.up_proj.weight"] = r(inner, hidden)
        out[p + "post_attention_layernorm.weight"] = r(hidden)
        for x in "kqv":
            out[p + f"self_attn.{x}_proj.weight"] = r(hidden, hidden)
        out[p + "self_attn.o_proj.weight"] = r(hidden, hidden)
    out["model.norm.weight"] = r(hidden)
    out["lm_head.weight"] = r(vocab, hidden)
    return out


def llama_config(layers: int = 2, hidden: int = 64, heads: int = 4, inner: int = 96, vocab: int = 50) -> dict[str, Any]:
    """The ``config.json`` that goes with :func:`llama_tensors`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers, "vocab_size": vocab,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def write_llama(folder: Path, shards: int = 1, **sizes: int) -> Path:
    """A LLaMA checkpoint with a few small files, in one weight file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = sizes.pop("seed", 0)
    tensors = llama_tensors(seed=seed, **sizes)
    (folder / "config.json").write_text(json.dumps(llama_config(**sizes)))
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    if shards == 1:
        save(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    per = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        part = {n: tensors[n] for n in names[i * per : (i + 1) * per]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pooled_plan(source, kv_heads: int = 1, head_dim: int = 16):
    """Entries and fetch function of a plain mean pooling of K and V, to drive a Target without the planner."""
    from rehead.checkpoints.target import OutputTensor

    entries = []
    for t in source.tensors.values():
        if ".k_proj." in t.name or ".v_proj." in t.name:
            entries.append(OutputTensor(t.name, t.dtype, (kv_heads * head_dim, t.shape[1])))
        else:
            entries.append(OutputTensor(t.name, t.dtype, t.shape, origin=t.name))

    def fetch(name: str) -> torch.Tensor:
        w = source.read(name)
        grouped = w.view(kv_heads, -1, head_dim, w.shape[1]).float().mean(1)
        return grouped.reshape(kv_heads * head_dim, w.shape[1]).to(w.dtype)

    return entries, fetch
