"""What layouts that came with remote code compute, written out from their descriptions, and their tensors' shapes.

Every function here takes the raw ``config.json`` and the tensors by their published names. No class of transformers and
nothing of Rehead takes part, so that both can be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
HIDDEN, HEADS, SIZE, INNER, VOCAB = 32, 4, 8, 48, 96


# ---- what they share


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def layer_norm(x: Tensor, tensors: Tensors, name: str, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + epsilon)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, dims: int, base: float, neighbours: bool) -> Tensor:
    """RoPE of [S, H, D] over the first ``dims``: pairs of neighbours, or of the two halves of those dimensions."""
    x = x.clone()
    for pair in range(dims // 2):
        a, b = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + dims // 2)
        angle = torch.arange(len(x)).double()[:, None] * base ** (-2 * pair / dims)
        first, second = x[..., a].clone(), x[..., b].clone()
        x[..., a] = first * angle.cos() - second * angle.sin()
        x[..., b] = second * angle.cos() + first * angle.sin()
    return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [S, H, D] over k and v [S, K, D], as [S, H * D]."""
    length, heads, size = q.shape
    group = heads // k.shape[1]
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T
        scores = (scores / math.sqrt(size)).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, head // group])
    return torch.cat(outputs, -1)


# ---- ChatGLM2, ChatGLM3, GLM-4


def glm_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kv = c["multi_query_group_num"] if c["multi_query_attention"] else HEADS
    rows = (HEADS + 2 * kv) * SIZE
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN)}
    shapes["transformer.rotary_pos_emb.inv_freq"] = (SIZE // 4,)
    for i in range(2):
        at = f"transformer.encoder.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}self_attention.query_key_value.weight": (rows, HIDDEN),
            f"{at}self_attention.query_key_value.bias": (rows,),
            f"{at}self_attention.dense.weight": (HIDDEN, HEADS * SIZE),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        }
    return shapes | {
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (VOCAB, HIDDEN),
    }


def glm(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    x = t["transformer.embedding.word_embeddings.weight"][tokens]
    kv, length, epsilon = c["multi_query_group_num"], len(tokens), c["layernorm_epsilon"]
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}."
        y = linear(rms(x, t[f"{at}input_layernorm.weight"], epsilon), t, f"{at}self_attention.query_key_value")
        if c["multi_query_attention"]:
            q, k, v = y[:, : HEADS * SIZE], y[:, HEADS * SIZE : (HEADS + kv) * SIZE], y[:, (HEADS + kv) * SIZE :]
            q, k, v = (part.reshape(length, -1, SIZE) for part in (q, k, v))
        else:
            q, k, v = (y.reshape(length, HEADS, 3, SIZE)[:, :, part] for part in range(3))
        q, k = (turned(part, SIZE // 2, 10000.0 * c.get("rope_ratio", 1), neighbours=True) for part in (q, k))
        x = x + linear(attend(q, k, v), t, f"{at}self_attention.dense")
        y = linear(rms(x, t[f"{at}post_attention_layernorm.weight"], epsilon), t, f"{at}mlp.dense_h_to_4h")
        x = x + linear(silu(y[:, :INNER]) * y[:, INNER:], t, f"{at}mlp.dense_4h_to_h")
    x = rms(x, t["transformer.encoder.final_layernorm.weight"], epsilon)
    return linear(x, t, "transformer.output_layer")


# ---- Llama's function under three sets of names


def _llama_like(
    c: dict[str, Any], t: Tensors, tokens: Tensor, names: dict[str, str], qkv: Callable[[Tensor, str], Any]
) -> Tensor:
    x = t[f"{names['table']}.weight"][tokens]
    epsilon = c["rms_norm_eps"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        q, k, v = qkv(rms(x, t[f"{at}{names['first']}.weight"], epsilon), at)
        q, k = (turned(part, SIZE, c.get("rope_theta", 10000.0), neighbours=False) for part in (q, k))
        x = x + linear(attend(q, k, v), t, f"{at}{names['output']}")
        y = rms(x, t[f"{at}{names['second']}.weight"], epsilon)
        gated = silu(linear(y, t, f"{at}{names['gate']}")) * linear(y, t, f"{at}{names['up']}")
        x = x + linear(gated, t, f"{at}{names['down']}")
    x = rms(x, t["model.norm.weight"], epsilon)
    head = t[f"{names['head']}.weight"]
    if names.get("unit"):
        head = head / head.norm(dim=-1, keepdim=True)
    return x @ head.T


_LLAMA = {
    "table": "model.embed_tokens",
    "first": "input_layernorm",
    "second": "post_attention_layernorm",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "head": "lm_head",
}
_INTERNLM2 = {
    "table": "model.tok_embeddings",
    "first": "attention_norm",
    "second": "ffn_norm",
    "output": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
    "head": "output",
}


def _named_shapes(names: dict[str, str], attention: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{names['table']}.weight": (VOCAB, HIDDEN)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{key}": shape for key, shape in attention.items()}
        shapes |= {f"{at}{names[norm]}.weight": (HIDDEN,) for norm in ("first", "second")}
        shapes |= {f"{at}{names[part]}.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"{at}{names['down']}.weight"] = (HIDDEN, INNER)
    return shapes | {"model.norm.weight": (HIDDEN,), f"{names['head']}.weight": (VOCAB, HIDDEN)}


def baichuan_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    attention = {"W_pack": (3 * HIDDEN, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    shapes = _named_shapes(_LLAMA, {f"self_attn.{key}.weight": shape for key, shape in attention.items()})
    return shapes | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (SIZE // 2,) for i in range(2)}


def baichuan(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    def qkv(x: Tensor, at: str) -> Any:
        return linear(x, t, f"{at}self_attn.W_pack").reshape(len(x), 3, HEADS, SIZE).unbind(1)

    second = {"unit": "yes"} if c["architectures"] == ["BaichuanForCausalLM"] else {}
    return _llama_like(c, t, tokens, {**_LLAMA, **second}, qkv)


def internlm_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    square: dict[str, tuple[int, ...]] = {}
    for part in "qkvo":
        square |= {f"self_attn.{part}_proj.weight": (HIDDEN, HIDDEN), f"self_attn.{part}_proj.bias": (HIDDEN,)}
    return _named_shapes(_LLAMA, square)


def internlm(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    def qkv(x: Tensor, at: str) -> Any:
        return tuple(linear(x, t, f"{at}self_attn.{part}_proj").reshape(len(x), HEADS, SIZE) for part in "qkv")

    return _llama_like(c, t, tokens, _LLAMA, qkv)


def internlm2_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rows = (HEADS + 2 * c["num_key_value_heads"]) * SIZE
    attention = {"attention.wqkv.weight": (rows, HIDDEN), "attention.wo.weight": (HIDDEN, HIDDEN)}
    return _named_shapes(_INTERNLM2, attention)


def internlm2(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    kv = c["num_key_value_heads"]
    group = HEADS // kv

    def qkv(x: Tensor, at: str) -> Any:
        # Each KV head's queries come first, then its key, then its value.
        y = linear(x, t, f"{at}attention.wqkv").reshape(len(x), kv, group + 2, SIZE)
        queries = torch.stack([y[:, head // group, head % group] for head in range(HEADS)], 1)
        return queries, y[:, :, group], y[:, :, group + 1]

    return _llama_like(c, t, tokens, _INTERNLM2, qkv)


# ---- the first Qwen


def qwen_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, HIDDEN)}
    for i in range(2):
        at = f"transformer.h.{i}."
        shapes |= {
            f"{at}ln_1.weight": (HIDDEN,),
            f"{at}ln_2.weight": (HIDDEN,),
            f"{at}attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            f"{at}attn.c_attn.bias": (3 * HIDDEN,),
            f"{at}attn.c_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.w1.weight": (INNER, HIDDEN),
            f"{at}mlp.w2.weight": (INNER, HIDDEN),
            f"{at}mlp.c_proj.weight": (HIDDEN, INNER),
        }
    return shapes | {"transformer.ln_f.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def qwen(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    x, epsilon = t["transformer.wte.weight"][tokens], c["layer_norm_epsilon"]
    for i in range(c["num_hidden_layers"]):
        at = f"transformer.h.{i}."
        y = linear(rms(x, t[f"{at}ln_1.weight"], epsilon), t, f"{at}attn.c_attn")
        q, k, v = (part.reshape(len(x), HEADS, SIZE) for part in y.split(HIDDEN, -1))
        q, k = (turned(part, SIZE, c["rotary_emb_base"], neighbours=False) for part in (q, k))
        x = x + linear(attend(q, k, v), t, f"{at}attn.c_proj")
        y = rms(x, t[f"{at}ln_2.weight"], epsilon)
        x = x + linear(linear(y, t, f"{at}mlp.w1") * silu(linear(y, t, f"{at}mlp.w2")), t, f"{at}mlp.c_proj")
    return linear(rms(x, t["transformer.ln_f.weight"], epsilon), t, "lm_head")


# ---- the first Phi


def phi_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    pairs = {"lm_head.ln": (HIDDEN,), "lm_head.linear": (VOCAB, HIDDEN)}
    for i in range(2):
        at = f"transformer.h.{i}."
        pairs |= {
            f"{at}ln": (HIDDEN,),
            f"{at}mixer.Wqkv": (3 * HIDDEN, HIDDEN),
            f"{at}mixer.out_proj": (HIDDEN, HIDDEN),
            f"{at}mlp.fc1": (4 * HIDDEN, HIDDEN),
            f"{at}mlp.fc2": (HIDDEN, 4 * HIDDEN),
        }
    shapes: dict[str, tuple[int, ...]] = {"transformer.embd.wte.weight": (VOCAB, HIDDEN)}
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def phi(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    x, epsilon = t["transformer.embd.wte.weight"][tokens], c["layer_norm_epsilon"]
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        y = layer_norm(x, t, f"{at}ln", epsilon)
        q, k, v = linear(y, t, f"{at}mixer.Wqkv").reshape(len(x), 3, HEADS, SIZE).unbind(1)
        q, k = (turned(part, c["rotary_dim"], 10000.0, neighbours=False) for part in (q, k))
        up = linear(y, t, f"{at}mlp.fc1")
        up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(attend(q, k, v), t, f"{at}mixer.out_proj") + linear(up, t, f"{at}mlp.fc2")
    return linear(layer_norm(x, t, "lm_head.ln", epsilon), t, "lm_head.linear")


# ---- Falcon under its first names


def falcon_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kv = c.get("n_head_kv", 1)
    norms = ("ln_attn", "ln_mlp") if "n_head_kv" in c else ("input_layernorm",)
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (VOCAB, HIDDEN)}
    for i in range(2):
        at = f"transformer.h.{i}."
        for norm in norms:
            shapes |= {f"{at}{norm}.weight": (HIDDEN,), f"{at}{norm}.bias": (HIDDEN,)}
        shapes |= {
            f"{at}self_attention.query_key_value.weight": ((HEADS + 2 * kv) * SIZE, HIDDEN),
            f"{at}self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
        }
    return shapes | {"transformer.ln_f.weight": (HIDDEN,), "transformer.ln_f.bias": (HIDDEN,)}


def falcon(c: dict[str, Any], t: Tensors, tokens: Tensor) -> Tensor:
    x, epsilon = t["transformer.word_embeddings.weight"][tokens], c["layer_norm_epsilon"]
    kv = c.get("n_head_kv", 1)
    group = HEADS // kv
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        names = ("ln_attn", "ln_mlp") if "n_head_kv" in c else ("input_layernorm",) * 2
        first, second = (layer_norm(x, t, f"{at}{name}", epsilon) for name in names)
        y = linear(first, t, f"{at}self_attention.query_key_value").reshape(len(x), kv, group + 2, SIZE)
        q, k, v = y[:, :, :group].reshape(len(x), HEADS, SIZE), y[:, :, group], y[:, :, group + 1]
        q, k = (turned(part, SIZE, 10000.0, neighbours=False) for part in (q, k))
        up = linear(second, t, f"{at}mlp.dense_h_to_4h")
        up = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        x = x + linear(attend(q, k, v), t, f"{at}self_attention.dense") + linear(up, t, f"{at}mlp.dense_4h_to_h")
    x = layer_norm(x, t, "transformer.ln_f", epsilon)
    return x @ t["transformer.word_embeddings.weight"].T
