"""What :mod:`rehead.benchmarks.uptrain` trains: its setting, models of random weights, a text of random words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from rehead.variants.latent.gauge import LANE_DEFAULT, NORM_EPS


@dataclass(frozen=True)
class Setting:
    """Shapes of the models and of the run; the defaults are SmolLM2-135M with one KV head, 32k tokens a step.

    Attributes:
        rows: of ``length`` tokens in an optimiser step.
        steps: measured, after ``warmup`` that are not.
        tied: whether the head is the embedding.
        document_tokens: length of a document in the text; 0 for one endless one, so that no row holds two.
        micro_batch: rows in a forward pass of Rehead's run; 0 lets it choose.
        trainer_rows: micro-batches to try the Trainer with; each must divide the rows of a process.
        trainer_weights: dtypes of the Trainer's weights.
        attention: of Rehead's run, as ``--attention``; the Trainer has transformers' default, SDPA.
        compile: compile the layers in Rehead's run.
        gradient_checkpointing: of both: layers are computed again in the backward pass.
        lora_rank: of adapters in Rehead's run; 0 trains all weights.
        latent, rope_dims: of a further student with a latent of so many numbers, as conversions store one; none with 0.
    """

    rows: int = 64
    length: int = 512
    steps: int = 24
    warmup: int = 4
    hidden_size: int = 576
    intermediate_size: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 1
    teacher_kv_heads: int = 3
    vocab_size: int = 49152
    tied: bool = True
    document_tokens: int = 0
    micro_batch: int = 0
    trainer_rows: tuple[int, ...] = (16, 32, 64)
    trainer_weights: tuple[str, ...] = ("float32", "bfloat16")
    attention: str = "sdpa"
    compile: bool = True
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    latent: int = 0
    rope_dims: int = 32

    @property
    def tokens(self) -> int:
        """Of the run, its warm-up included."""
        return (self.steps + self.warmup) * self.rows * self.length

    def operations(self, kv_heads: int) -> tuple[float, float]:
        """Floating-point operations a token of one forward pass: of the weights' products, and of causal attention."""
        width, size = self.hidden_size, self.hidden_size // self.heads
        layer = 2 * width * width + 2 * width * kv_heads * size + 3 * width * self.intermediate_size
        weights = self.layers * layer + width * self.vocab_size
        return 2.0 * weights, 2.0 * self.length * width * self.layers


def training_operations(setting: Setting, loss: str) -> float:
    """Operations a token that a step needs at least: what is computed again to save memory does not count.

    Forward, the gradient of what enters each product, and (not with adapters, which are small) that of the weights; a
    teacher's forward pass.
    """
    weights, attention = setting.operations(setting.kv_heads)
    total = weights * (2 if setting.lora_rank else 3) + attention * 3
    return total + (sum(setting.operations(setting.teacher_kv_heads)) if loss == "kd" else 0.0)


def write_model(folder: Path, setting: Setting, kv_heads: int, seed: int, device: torch.device) -> None:
    """A checkpoint with random weights in bf16, and a tokenizer whose words are numbers."""
    config = LlamaConfig(**_shape(setting), num_key_value_heads=kv_heads)
    torch.manual_seed(seed)
    with device:
        model = LlamaForCausalLM(config)
    _save(model, folder, setting)


def write_latent(folder: Path, setting: Setting) -> None:
    """The same with latent attention in every layer, at the scale at which Rehead stores it."""
    size = setting.hidden_size // setting.heads
    config = DeepseekV3Config(
        **_shape(setting),
        moe_intermediate_size=setting.intermediate_size,
        first_k_dense_replace=setting.layers,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=setting.heads,
        q_lora_rank=None,
        kv_lora_rank=setting.latent,
        qk_rope_head_dim=setting.rope_dims,
        qk_nope_head_dim=size,
        v_head_dim=size,
    )
    torch.manual_seed(2)
    model: Any = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.weight.fill_(LANE_DEFAULT)
            layer.self_attn.kv_a_proj_with_mqa.weight[: setting.latent] *= NORM_EPS**0.5 / LANE_DEFAULT
    _save(model, folder, setting)


def _shape(setting: Setting) -> dict[str, Any]:
    """What the configs of both classes have in common."""
    return {
        "vocab_size": setting.vocab_size,
        "hidden_size": setting.hidden_size,
        "intermediate_size": setting.intermediate_size,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "max_position_embeddings": max(setting.length, 2048),
        "tie_word_embeddings": setting.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _save(model: Any, folder: Path, setting: Setting) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(setting.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="0").save_pretrained(folder)


def write_text(path: Path, setting: Setting) -> None:
    """Random words for every step."""
    count = setting.tokens + 1
    ids = torch.randint(1, setting.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    line = setting.document_tokens or 256
    path.write_text("\n".join(" ".join(map(str, ids[at : at + line])) for at in range(0, count, line)) + "\n")


def text_name(path: Path, setting: Setting) -> str:
    """What to call that text in ``--data``."""
    return f"{path}#lines" if setting.document_tokens else str(path)
