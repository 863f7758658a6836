"""The small models that engines are given: one of every class that a conversion can end in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 32, 128, 2

PART_ROPE = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
ROPE = {"rope_type": "default", "rope_theta": 20000.0}
WINDOWS = ["sliding_attention", "full_attention"]
# Bases of other than 10000 show engines that do not read them; some classes get a case with 10000 beside.
USUAL_PART_ROPE = {**PART_ROPE, "rope_theta": 10000.0}
NEOX = {"hidden_act": "gelu", "rope_parameters": USUAL_PART_ROPE, "intermediate_size": 4 * HIDDEN}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "rope_parameters": ROPE, "rope_interleave": True, "rms_norm_eps": 1e-6,
}  # fmt: skip

DENSE_LATENT = {
    **LATENT, "first_k_dense_replace": LAYERS, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_nextn_predict_layers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A source and what is done to it.

    Attributes:
        source: a model type of transformers, small with random weights; ``embedded``, ``smollm2`` or ``chatglm2``.
        config: fields of the random model's config.
        convert: options of :func:`rehead.convert.convert`; None serves the source itself.
        client: options for single engines' clients, by engine.
        note: what the case stands for.
        only: the engines that are given it; all, if empty.
        prompt_tokens: length of the prompt.
        short_text: whether a model with a RoPE for longer texts is given one that it could read before.
    """

    source: str
    config: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] | None = field(default_factory=lambda: {"num_key_value_heads": 2})
    client: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""
    only: tuple[str, ...] = ()
    prompt_tokens: int = 64
    short_text: bool = False


GROUPED = {"rope_parameters": ROPE, "num_key_value_heads": 2}
SHORT = {"calibration": ["random"], "calibration_tokens": 2048, "calibration_length": 128}
MQA = {"num_key_value_heads": 1}
FLAT = {"flat_rotary": True}
BACKEND = {"model_impl": "transformers"}
SWA: dict[str, Any] = {
    "layer_types": WINDOWS, "layer_rope_theta": [20000.0, 20000.0], "rope_parameters": ROPE, "sliding_window": 32,
    "attention_multiplier": HEAD_DIM**-0.5, "num_key_value_heads": 2,
}  # fmt: skip

GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 6, "layer_types": [*WINDOWS[:1] * 5, WINDOWS[1]], "sliding_window": 32,
    "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
}  # fmt: skip

# Models of 64 tokens that are to read 256, and prompts on either side of the 64.
OLD_LENGTH = {"max_position_embeddings": 64}
LONG: dict[str, Any] = {"client": {"vllm": {"max_model_len": 256}}, "prompt_tokens": 160}
WITHIN: dict[str, Any] = {**LONG, "prompt_tokens": 32, "short_text": True}
LLAMA3 = {
    **ROPE, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _longer(rope: str, source: str = "llama", engine: str | None = None, kv_heads: int = 2, **how: Any) -> Case:
    """A model that was made to read four times as much."""
    config = {**GROUPED, **OLD_LENGTH, "num_key_value_heads": kv_heads}
    if source == "phi3":
        config |= {"original_max_position_embeddings": 64}
    fitted = SHORT | {"calibration_length": 64} if rope == "fitted" else {}
    return Case(source, config, {"context": 256, "rope": rope, "engine": engine, **fitted}, **how)


CASES: dict[str, Case] = {
    "embedded": Case("embedded", note="the trained model that ships with Rehead, 8 KV heads to 2"),
    "embedded-mqa": Case("embedded", convert=MQA),
    "llama": Case("llama", {"rope_parameters": ROPE}),
    "llama-mqa": Case("llama", {"rope_parameters": ROPE}, MQA),
    "mistral": Case("mistral", {"sliding_window": None, "rope_parameters": ROPE}),
    "mistral-window": Case("mistral", {"sliding_window": 32, "rope_parameters": ROPE}),
    "mixtral": Case("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": Case("qwen2", {"rope_parameters": ROPE}),
    "qwen3": Case("qwen3", {"rope_parameters": ROPE}),
    "gemma": Case("gemma", {"tie_word_embeddings": True}),
    "gemma2": Case(
        "gemma2",
        {"layer_types": WINDOWS, "sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "gemma3": Case("gemma3_text", GEMMA3),
    "gemma3-alternating": Case(
        "gemma3_text",
        {"layer_types": WINDOWS, "sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        note="every other layer with a window, where Gemma 3 has five of six",
    ),
    "phi": Case("phi", {"rope_parameters": PART_ROPE}),
    "phi-usual": Case("phi", {"rope_parameters": USUAL_PART_ROPE, "intermediate_size": 4 * HIDDEN}),
    "phi-mha": Case(
        "phi", {"rope_parameters": USUAL_PART_ROPE, "intermediate_size": 4 * HIDDEN}, {"num_key_value_heads": HEADS}
    ),
    "phi3": Case("phi3", {"rope_parameters": ROPE}),
    "gpt_neox-parallel": Case("gpt_neox", NEOX, note="re-hosted as phi"),
    "gpt_neox-parallel-mha": Case("gpt_neox", NEOX, {"host": "phi"}, note="re-hosted as phi, as many KV heads"),
    "gpt_neox-serial": Case("gpt_neox", {**NEOX, "use_parallel_residual": False}, note="re-hosted as nemotron"),
    "gpt_neox-serial-full": Case(
        "gpt_neox",
        {**NEOX, "rope_parameters": {**USUAL_PART_ROPE, "partial_rotary_factor": 1.0}, "use_parallel_residual": False},
        note="re-hosted as starcoder2",
    ),
    "gptj": Case("gptj", {"rotary_dim": 16, "n_inner": None}, note="re-hosted as phi"),
    "codegen": Case("codegen", {"rotary_dim": 16, "n_inner": None}, note="re-hosted as phi"),
    "gpt2": Case("gpt2", {"tie_word_embeddings": True}, MQA, note="re-hosted as gpt_bigcode"),
    "opt": Case(
        "opt",
        {"ffn_dim": 512, "word_embed_proj_dim": HIDDEN, "tie_word_embeddings": True},
        MQA,
        note="re-hosted as gpt_bigcode",
    ),
    "biogpt": Case("biogpt", {"intermediate_size": 512}, MQA, note="re-hosted as gpt_bigcode, head of its own"),
    "gpt_bigcode": Case("gpt_bigcode", {"multi_query": False, "tie_word_embeddings": True}, MQA),
    "starcoder2": Case("starcoder2", {"rope_parameters": ROPE, "sliding_window": None}),
    "nemotron": Case("nemotron", {"rope_parameters": PART_ROPE}),
    "falcon-mqa": Case(
        "falcon",
        {
            "multi_query": False,
            "new_decoder_architecture": False,
            "num_kv_heads": HEADS,
            "ffn_hidden_size": 512,
            "tie_word_embeddings": True,
        },
        MQA,
    ),
    "falcon-gqa": Case(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": HEADS, "ffn_hidden_size": 512, "tie_word_embeddings": True},
    ),
    "glm": Case("glm", {"rope_parameters": PART_ROPE}),
    "glm-usual": Case("glm", {"rope_parameters": USUAL_PART_ROPE}),
    "chatglm2": Case(
        "chatglm2",
        {"rope_parameters": USUAL_PART_ROPE, "num_key_value_heads": 2},
        {"num_key_value_heads": 1, "method": "svd", "calibration_tokens": 2048},
        note="ChatGLM2's published layout, 2 KV heads to 1",
    ),
    "glm4": Case("glm4", {"rope_parameters": PART_ROPE}),
    "stablelm": Case("stablelm", {"use_qkv_bias": True, "rope_parameters": PART_ROPE}),
    "stablelm-usual": Case("stablelm", {"use_qkv_bias": True, "rope_parameters": USUAL_PART_ROPE}),
    "stablelm-parallel": Case(
        "stablelm",
        {"rope_parameters": USUAL_PART_ROPE},
        {"block": "parallel", "layers": "all"},
        note="blocks made parallel",
    ),
    "olmo2": Case("olmo2", {"rope_parameters": ROPE}),
    "cohere": Case("cohere", {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "granite": Case("granite", {"rope_parameters": ROPE, "attention_multiplier": 0.2}),
    "smollm3": Case("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "rope_parameters": ROPE}),
    "t5": Case(
        "t5",
        {
            "d_model": HIDDEN,
            "d_kv": HEAD_DIM,
            "d_ff": 192,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        note="carries a modelling file",
    ),
    "granite_swa": Case("granite_swa", SWA, None, note="written directly: windows with sinks"),
    "granite_swa-transformers": Case(
        "granite_swa", SWA, None, {"vllm": BACKEND}, note="the same by vLLM's transformers backend", only=("vllm",)
    ),
    "youtu": Case("youtu", LATENT, None, note="written directly: latent attention"),
    "youtu-27": Case("youtu", {**LATENT, "num_hidden_layers": 27}, None, note="the same with 27 layers"),
    "youtu-queries": Case("youtu", {**LATENT, "q_lora_rank": 64}, None, note="the same with a latent of the queries"),
    "deepseek_v3": Case(
        "deepseek_v3", DENSE_LATENT, None, {"vllm": FLAT}, note="written directly: latent attention, every layer dense"
    ),
    "deepseek_v3-as-shipped": Case(
        "deepseek_v3", DENSE_LATENT, None, note="the same, vLLM's rotary op as it is shipped", only=("vllm",)
    ),
    "deepseek_v3-27": Case(
        "deepseek_v3",
        {**DENSE_LATENT, "num_hidden_layers": 27, "first_k_dense_replace": 27},
        None,
        {"vllm": FLAT},
        note="the same with 27 layers",
    ),
    "deepseek_v3-queries": Case(
        "deepseek_v3",
        {**DENSE_LATENT, "q_lora_rank": 64},
        None,
        {"vllm": FLAT},
        note="the same with a latent of the queries",
    ),
    "window": Case(
        "llama",
        GROUPED,
        {"window": 32, "layers": "1", "sink_logit": True, **SHORT},
        note="as granite_swa, with a logit",
    ),
    "window-transformers": Case(
        "llama",
        GROUPED,
        {"window": 32, "layers": "1", "sink_logit": True, **SHORT},
        {"vllm": BACKEND},
        note="the same by vLLM's transformers backend",
        only=("vllm",),
    ),
    "window-ministral": Case("llama", GROUPED, {"window": 32, "layers": "0"}, note="as ministral, without sinks"),
    "window-qwen2": Case("qwen2", GROUPED, {"window": 32, "layers": "0"}, note="its own class, one layer of two"),
    "window-qwen3": Case("qwen3", GROUPED, {"window": 32, "layers": "0"}, note="its own class, one layer of two"),
    "window-sinks": Case(
        "llama", GROUPED, {"window": 32, "sinks": 4}, note="sink tokens, which only a modelling file has"
    ),
    "latent": Case("llama", GROUPED, {"latent": 64, "rope_dims": 16, **SHORT}, {"vllm": FLAT}, note="as deepseek_v3"),
    "latent-llama.cpp": Case(
        "llama",
        GROUPED,
        {"latent": 64, "rope_dims": 16, "engine": "llama.cpp", **SHORT},
        {"vllm": FLAT},
        note="as deepseek_v3 with --for llama.cpp",
    ),
    "latent-youtu": Case(
        "llama", GROUPED, {"latent": 48, "rope_dims": 32, "host": "youtu", **SHORT}, note="as youtu, another size"
    ),
    "latent-youtu-llama.cpp": Case(
        "llama",
        GROUPED,
        {"latent": 48, "rope_dims": 32, "host": "youtu", "engine": "llama.cpp", **SHORT},
        note="as youtu with --for llama.cpp, another size",
    ),
    "latent-576": Case(
        "llama",
        {
            "rope_parameters": ROPE,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
        {"latent": 512, "rope_dims": 64, **SHORT},
        {"vllm": {**FLAT, "latents": True}},
        note="as deepseek_v3, 512 numbers and a rotated key of 64",
    ),
    "latent-qwen2": Case(
        "qwen2", GROUPED, {"latent": 64, "rope_dims": 16, **SHORT}, {"vllm": FLAT}, note="as deepseek_v3, with biases"
    ),
    "longer-linear": _longer("linear", note="64 tokens to 256, read 160", **LONG),
    "longer-ntk": _longer("ntk", note="the same", **LONG),
    "longer-yarn": _longer("yarn", note="the same", **LONG),
    "longer-dynamic": _longer("dynamic", note="the same", **LONG),
    "longer-dynamic-short": _longer("dynamic", note="the same, read 32", **WITHIN),
    "longer-longrope": _longer("longrope", note="64 tokens to 256, read 160", **LONG),
    "longer-longrope-short": _longer("longrope", note="the same, read 32", **WITHIN),
    "longer-longrope-vllm": _longer(
        "longrope", engine="vllm", note="64 tokens to 256 with --for vllm, read 160", **LONG
    ),
    "longer-longrope-vllm-short": _longer("longrope", engine="vllm", note="the same, read 32", **WITHIN),
    "longer-longrope-vllm-64": _longer(
        "longrope",
        engine="vllm",
        note="the same, served for texts of up to 64 tokens",
        only=("vllm",),
        **(WITHIN | {"client": {"vllm": {"max_model_len": 64}}}),
    ),
    "longer-fitted": _longer("fitted", note="64 tokens to 256, read 160: longrope with factors fitted to text", **LONG),
    "longer-phi3": _longer("longrope", "phi3", note="64 tokens to 256, read 160", **LONG),
    "longer-phi3-short": _longer("longrope", "phi3", note="the same, read 32", **WITHIN),
    "longer-phi3-vllm": _longer("longrope", "phi3", "vllm", note="64 tokens to 256 with --for vllm, read 160", **LONG),
    "longer-phi3-vllm-short": _longer("longrope", "phi3", "vllm", note="the same, read 32", **WITHIN),
    **{
        f"longer-{source}-mha-{rope}{'-vllm' if engine else ''}": _longer(
            rope, source, engine, HEADS, note="64 tokens to 256 with as many KV heads, read 160", **LONG
        )
        for source, rope, engine in (
            ("llama", "linear", None),
            ("llama", "ntk", None),
            ("llama", "dynamic", None),
            ("llama", "longrope", None),
            ("llama", "longrope", "vllm"),
            ("phi3", "longrope", None),
            ("phi3", "longrope", "vllm"),
        )
    },
    **{
        f"longer-{source}-mha-longrope-vllm-short": _longer(
            "longrope", source, "vllm", HEADS, note="the same, read 32", **WITHIN
        )
        for source in ("llama", "phi3")
    },
    "longer-mistral": _longer("yarn", "mistral", note="64 tokens to 256, read 160", **LONG),
    "longer-qwen2": _longer("yarn", "qwen2", note="the same", **LONG),
    "longer-qwen3": _longer("yarn", "qwen3", note="the same", **LONG),
    "longer-gemma3": Case(
        "gemma3_text",
        {**OLD_LENGTH, **GEMMA3},
        {"context": 256, "rope": "linear"},
        note="64 tokens to 256, read 160",
        **LONG,
    ),
    "llama3": Case("llama", {"rope_parameters": LLAMA3}, note="Llama 3's frequencies, read 160 tokens", **LONG),
    "latent-llama3": Case(
        "llama",
        {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
        {"latent": 64, "rope_dims": 32, **SHORT},
        {"vllm": {**FLAT, "max_model_len": 256}},
        note="Llama 3's frequencies, as deepseek_v3, read 160 tokens",
        prompt_tokens=160,
    ),
    "latent-llama3-youtu": Case(
        "llama",
        {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
        {"latent": 64, "rope_dims": 32, "host": "youtu", **SHORT},
        {"vllm": {"max_model_len": 256}},
        note="the same as youtu",
        prompt_tokens=160,
    ),
    "deepseek_v3-llama3": Case(
        "deepseek_v3",
        {**DENSE_LATENT, "rope_parameters": LLAMA3, "q_lora_rank": 64},
        None,
        {"vllm": {**FLAT, "max_model_len": 256}},
        note="written directly, with a latent of the queries, read 160 tokens",
        prompt_tokens=160,
    ),
    "embedded-longer": Case(
        "embedded",
        convert={"context": 4096},
        client={"vllm": {"max_model_len": 4096}},
        note="1,024 tokens to 4,096 by YaRN, read 1,536",
        prompt_tokens=1536,
    ),
    "smollm2-latent": Case(
        "smollm2",
        convert={"latent": 96, "rope_dims": 32, "calibration_tokens": 2048},
        client={"llama.cpp": {"numbered": False}, "vllm": FLAT},
        note="SmolLM2-135M-Instruct, 384 numbers per token and layer to 128",
    ),
    "smollm2-latent-llama.cpp": Case(
        "smollm2",
        convert={"latent": 96, "rope_dims": 32, "calibration_tokens": 2048, "engine": "llama.cpp"},
        client={"llama.cpp": {"numbered": False}, "vllm": FLAT},
        note="the same with --for llama.cpp",
    ),
    "smollm2-latent-vllm": Case(
        "smollm2",
        convert={"latent": 96, "rope_dims": 32, "calibration_tokens": 2048, "engine": "vllm"},
        client={"llama.cpp": {"numbered": False}, "vllm": FLAT},
        note="the same with --for vllm: a head of its own",
    ),
    "smollm2-latent-youtu": Case(
        "smollm2",
        convert={
            "latent": 160,
            "rope_dims": 32,
            "calibration_tokens": 2048,
            "host": "youtu",
            "engine": "llama.cpp",
        },
        client={"llama.cpp": {"numbered": False}},
        note="384 to 192, as youtu with --for llama.cpp",
    ),
    "smollm2": Case(
        "smollm2",
        convert={"num_key_value_heads": 1, "method": "svd", "calibration_tokens": 2048},
        client={"llama.cpp": {"numbered": False}},
        note="SmolLM2-135M-Instruct, 3 KV heads to 1",
    ),
}
