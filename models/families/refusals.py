"""Model types that Rehead knows and refuses, each with one line that says why and what to do instead.

Groups that a config shows by itself (encoder-decoder, multimodal) are refused in :mod:`rehead.models.families.resolve`.
"""

from __future__ import annotations

from rehead.models.families.spec import Refusal

_LATENT = (
    "keeps a latent (multi-head latent attention) in place of KV heads, from which conversions start; "
    "give a model with multi-head or grouped-query attention"
)
_NO_COUNT = (
    "its transformers class holds one KV head for each query head and nothing else, so no config can load fewer; "
    "and Rehead knows no other class to stand in for it; give a model whose class has num_key_value_heads"
)
_ATTENTION_FREE = "has no attention at all, so there is none to convert; give a model with attention"
_ENCODER = "is an encoder, not a causal language model, and has no KV cache to shrink; give a decoder-only model"
_PER_LAYER = (
    "its layers differ in head size, KV heads or whose keys and values they read, which one --kv-heads cannot say; "
    "give a model whose layers are alike"
)
_INDEXED = (
    "an indexer picks for each KV head which keys it reads, and would have to be trained again for fewer; "
    "give a model with plain attention"
)
_CONVOLVED = (
    "mixes its keys and values over time or position with weights of their own for each head, which pooling cannot "
    "carry over; give a model with plain attention"
)
_MULTIMODAL = "reads images or sound in its own layers, so it has no language model apart; give a text-only model"

_REASONS: dict[str, tuple[str, ...]] = {
    _LATENT: (
        "axk1",
        "axk2",
        "bailing_hybrid",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note_text",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "hy_v4",
        "kimi_linear",
        "longcat_flash",
        "minicpm3",
        "youtu",
    ),
    _NO_COUNT: (
        "cpmant",
        "ctrl",
        "gpt_neox_japanese",
        "hrm_text",
        "imagegpt",
        "modernbert-decoder",
    ),
    _ATTENTION_FREE: ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    _ENCODER: (
        "albert",
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "convbert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "esm",
        "eurobert",
        "funnel",
        "longformer",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "mpnet",
        "neobert",
        "nystromformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "squeezebert",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
    _PER_LAYER: ("gemma3n_text", "gemma4_text", "gemma4_unified_text", "mimo_v2_flash"),
    _INDEXED: ("minimax_m3_vl_text", "qwen4_exp_text"),
    _CONVOLVED: ("inkling2_text", "inkling_text", "zaya"),
    _MULTIMODAL: ("git", "mllama", "mllama_text_model", "moshi", "phi4_multimodal"),
}

_SINGLE = {
    "bloom": (
        "its class holds one KV head for each query head only, and Falcon's, the only other with ALiBi, scales it by "
        "the head size, so positions would not be the same; give a model whose class has num_key_value_heads"
    ),
    "mpt": (
        "its class holds one KV head for each query head only, and Falcon's, the only other with ALiBi, scales it by "
        "the head size, so positions would not be the same; give a model whose class has num_key_value_heads"
    ),
    "openai-gpt": (
        "its class holds one KV head for each query head only, and norms behind its sublayers, which no class with "
        "fewer KV heads does; give a model whose class has num_key_value_heads"
    ),
    "persimmon": (
        "its class holds one KV head for each query head only, and no other has its norms on queries and keys in a "
        "serial block with a plain FFN; give a model whose class has num_key_value_heads"
    ),
    "blt": "is three byte-level models in one, each with heads of its own; give a model with one stack of layers",
    "diffllama": (
        "subtracts one half of its heads' attention from the other's and reads values across both, so neighbouring KV "
        "heads are no group; give a model with plain attention"
    ),
    "doge": "works out its mask from the values of each KV head, which pooling would change; give another model",
    "jetmoe": "its query heads are experts that a router picks for each token; give a model with plain attention",
    "reformer": "buckets its keys by hashing and ties them to its queries; give a model with plain attention",
    "xlnet": "has relative positions with weights for each head and two streams; give a decoder-only model",
    "zamba": "shares one attention block between many layers; give a model whose layers have attention of their own",
    "zamba2": "shares one attention block between many layers; give a model whose layers have attention of their own",
}

REFUSALS: dict[str, Refusal] = {
    name: Refusal(name, reason)
    for name, reason in [
        *((name, reason) for reason, names in _REASONS.items() for name in names),
        *_SINGLE.items(),
    ]
}
