"""vLLM on the CPU: offline engine in this process, float32, token ids in and out."""

from __future__ import annotations

import os
from typing import Any

# Attention over an expanded latent: vLLM's CPU kernel for latents takes only those of 576 and of 320 numbers.
os.environ["VLLM_MLA_DISABLE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch._dynamo
import vllm

# Loaded here, once, rather than in every job's process.
import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.model_executor.models.transformers
import vllm.v1.engine.core
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker
from protocol import serve
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

# vLLM looks at a model class in a new process, which has to import everything again. A job's process is one already.
vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()

FLAT = "the CPU rotary op was handed flat tensors: as shipped it misreads queries of [tokens, heads, size]"


def flat_rotary() -> None:
    """Hand vLLM's CPU rotary op contiguous tensors of [tokens, heads x size], which it reads rightly.

    DeepSeek's classes hand it queries of [tokens, heads, size], which it reads wrongly, contiguous or not.
    """
    shipped = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = positions.numel()
        flat_key = None if key is None else key.reshape(tokens, -1).contiguous()
        rotated = shipped(self, positions, query.reshape(tokens, -1).contiguous(), flat_key)
        return rotated[0].view(query.shape), None if key is None else rotated[1].view(key.shape)

    RotaryEmbedding.forward_cpu = forward_cpu


def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Continue the prompt greedily."""
    notes = []
    if job["options"].get("flat_rotary"):
        flat_rotary()
        notes.append(FLAT)
    if job["options"].get("latents"):
        os.environ["VLLM_MLA_DISABLE"] = "0"
        notes.append("over the latents themselves")
    engine = vllm.LLM(
        job["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_num_seqs=1,
        enable_prefix_caching=False, disable_log_stats=True, model_impl=job["options"].get("model_impl", "auto"),
        max_model_len=job["options"].get("max_model_len", 128),
    )  # fmt: skip
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0, detokenize=False
    )
    answer = engine.generate([{"prompt_token_ids": job["prompt"]}], greedy, use_tqdm=False)[0].outputs[0]
    tokens = list(answer.token_ids)
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    model = type(runner.model).__name__
    if model.startswith("Transformers"):
        notes.append("through its transformers backend")
    return {
        "tokens": tokens,
        "logprobs": [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)],
        "cache_bytes_per_token": _cache_bytes(engine),
        "notes": notes,
    }


def _cache_bytes(engine: Any) -> float | None:
    """Bytes per token of the pages that the engine allocated, over all layers."""
    try:
        config = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        pages = sum(
            len(group.layer_names) * group.kv_cache_spec.page_size_bytes / group.kv_cache_spec.block_size
            for group in config.kv_cache_groups
        )
    except AttributeError:
        return None
    return float(pages)


if __name__ == "__main__":
    serve(vllm.__version__, handle)
