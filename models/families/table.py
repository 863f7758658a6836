"""The table: one entry for each architecture. Adding an architecture touches this file alone.

The whole test battery (tests/models/test_families.py) runs on every entry by itself.
"""

from __future__ import annotations

from dataclasses import replace

from rehead.models.families import readers as r
from rehead.models.families import special as s
from rehead.models.families.spec import Family, Names, query_heads, rotary_none, rotary_partial

_QK_LAYERNORM = Names(query_norm="q_layernorm", key_norm="k_layernorm")

_PLAIN = (
    # Separate projections, RoPE over the whole head in halves, serial block: Llama and what follows it to the letter.
    Family("llama"),
    Family("arcee"),
    Family("aria_text"),
    Family("cwm"),
    Family("gemma"),
    Family("granite", residual_scale=r.scale_of("residual_multiplier")),
    Family("granitemoe", residual_scale=r.scale_of("residual_multiplier")),
    Family("granitemoeshared", residual_scale=r.scale_of("residual_multiplier")),
    Family("internlm3"),
    Family("iquestcoder"),
    Family("jais2"),
    Family("ministral"),
    Family("ministral3"),
    Family("mistral"),
    Family("mixtral"),
    Family("olmo", clip=r.clip_of),
    Family("phimoe"),
    Family("qwen2"),
    Family("qwen2_moe"),
    Family("seed_oss"),
    Family("starcoder2"),
    Family("vaultgemma"),
    Family("solar_open", rotary_dims=rotary_partial),
    Family("nemotron", rotary_dims=rotary_partial),
    Family("smollm3", rotary_dims=r.rotary_by_list, notes="some layers do not rotate"),
    # The attention's output is normed before it joins the stream.
    Family("gemma2", post_norm=True),
    Family(
        "hyperclovax",
        post_norm=lambda config: bool(config.use_post_norm),
        residual_scale=r.scale_of("residual_multiplier"),
    ),
    # Sinks: one learned logit for each query head.
    Family("gpt_oss", query_extras=("sinks",), notes="attention sinks"),
    Family(
        "granite_swa",
        rotary_dims=r.rotary_by_theta,
        residual_scale=r.scale_of("residual_multiplier"),
        query_extras=("sinks",),
        notes="attention sinks",
    ),
    Family(
        "granitemoe_swa",
        rotary_dims=r.rotary_by_theta,
        residual_scale=r.scale_of("residual_multiplier"),
        query_extras=("sinks",),
        notes="attention sinks",
    ),
    Family("bitnet", fixed_values=True, query_extras=("attn_sub_norm.weight",), notes="norm before o_proj"),
)

_INTERLEAVED = (
    # RoPE over neighbouring dimensions.
    Family("ernie4_5", pairing="interleaved"),
    Family("ernie4_5_moe", pairing="interleaved"),
    Family("glm", pairing="interleaved", rotary_dims=rotary_partial),
    Family("glm4", pairing="interleaved", rotary_dims=rotary_partial, post_norm=True),
    Family("helium", pairing="interleaved"),
    Family("cohere", pairing="interleaved", key_norm=r.norm_if("use_qk_norm", "layer_own"), block="parallel"),
    Family("cohere2", pairing="interleaved", rotary_dims=r.rotary_in_windows, block="parallel"),
    Family("cohere2_moe", pairing="interleaved", rotary_dims=s.cohere2_moe_rotary, block="parallel"),
    Family(
        "llama4_text",
        pairing="interleaved",
        rotary_dims=r.rotary_by_list,
        key_norm=s.llama4_norm,
        norm_after_rotation=True,
    ),
)

_NORMED = (
    # RMS over each head with one weight for all heads.
    Family("qwen3", key_norm="rms"),
    Family("qwen3_moe", key_norm="rms"),
    Family("apertus", key_norm="rms"),
    Family("dots1", key_norm="rms"),
    Family("hy_v3", key_norm="rms"),
    Family("mellum", key_norm="rms"),
    Family("gemma3_text", key_norm="rms", norm_offset=1.0, post_norm=True),
    Family("glm4_moe", key_norm=r.norm_if("use_qk_norm", "rms"), rotary_dims=rotary_partial),
    *(
        Family(
            name,
            key_norm="rms",
            norm_after_rotation=True,
            names=Names(query_norm="query_layernorm", key_norm="key_layernorm"),
        )
        for name in ("hunyuan_v1_dense", "hunyuan_v1_moe")
    ),
    Family("exaone4", key_norm="rms", rotary_dims=r.rotary_in_windows_if_any, post_norm=True),
    Family("exaone_moe", key_norm="rms", rotary_dims=r.rotary_in_windows_if_any),
    Family("kolibri1", key_norm="rms", rotary_dims=r.rotary_in_windows_if_any, post_norm=True),
    Family(
        "flint",
        key_norm="rms",
        rotary_dims=r.rotary_in_windows,
        query_extras=("sinks", "softmax_offset"),
        notes="attention sinks",
    ),
    Family(
        "afmoe",
        key_norm="rms",
        rotary_dims=r.rotary_in_windows,
        post_norm=True,
        fixed_values=True,
        query_extras=("gate_proj.weight",),
        notes="output gate for each channel",
    ),
    Family(
        "beam",
        key_norm="rms",
        rotary_dims=r.rotary_if_parameters,
        post_norm=True,
        residual_scale=s.beam_scale,
        fixed_values=True,
        query_extras=("gate_proj.weight", "gate_bias"),
        notes="output gate for each channel",
    ),
    Family(
        "laguna",
        key_norm="rms",
        rotary_dims=rotary_partial,
        refusal=s.laguna_refusal,
        fixed_values=s.laguna_fixed_values,
        query_extras=("g_proj.weight",),
        notes="output gate",
    ),
    # RMS over each head without a weight.
    Family("nanochat", key_norm="l2"),
    # RMS over all heads together: its key weight shrinks with the heads.
    Family("olmo2", key_norm="rms_span", post_norm=True),
    Family("olmo3", key_norm="rms_span", post_norm=True),
    Family("olmoe", key_norm="rms_span", clip=r.clip_of),
    Family("flex_olmo", key_norm="rms_span", post_norm=True),
    Family("minimax_m2", key_norm="rms_span", rotary_dims=rotary_partial),
    # LayerNorm.
    Family(
        "phi",
        names=replace(_QK_LAYERNORM, output="dense"),
        key_norm=r.norm_if("qk_layernorm", "layer"),
        rotary_dims=rotary_partial,
        block="parallel",
    ),
    Family(
        "stablelm",
        names=_QK_LAYERNORM,
        key_norm=r.norm_if("qk_layernorm", "layer_own"),
        rotary_dims=rotary_partial,
        block=r.parallel_if("use_parallel_residual"),
    ),
)

_FUSED = (
    Family("phi3", packing="blocks", names=Names(query="qkv_proj"), rotary_dims=rotary_partial),
    Family(
        "falcon",
        layer="transformer.h.{i}.",
        attention="self_attention.",
        packing="groups",
        names=Names(query="query_key_value", output="dense"),
        rotary_dims=s.falcon_rotary,
        num_kv_heads=s.falcon_kv_heads,
        set_kv=s.set_falcon_kv,
        refusal=s.falcon_refusal,
        block=s.falcon_block,
        notes="three fused layouts; between 1 and all KV heads only as a parallel block",
    ),
    Family(
        "gpt_bigcode",
        layer="transformer.h.{i}.",
        attention="attn.",
        packing="groups",
        names=Names(query="c_attn", output="c_proj"),
        pairing="none",
        rotary_dims=rotary_none,
        num_kv_heads=s.bigcode_kv_heads,
        set_kv=s.set_bigcode_kv,
        refusal=s.bigcode_refusal,
        notes="one KV head or all",
    ),
    Family(
        "gpt2",
        layer="transformer.h.{i}.",
        attention="attn.",
        packing="blocks",
        transposed=True,
        names=Names(query="c_attn", output="c_proj"),
        pairing="none",
        rotary_dims=rotary_none,
        num_kv_heads=query_heads,
        set_kv=s.set_no_kv,
        refusal=s.one_head_refusal,
        hosted=True,
        notes="to one KV head, as gpt_bigcode",
    ),
    Family(
        "dbrx",
        layer="transformer.blocks.{i}.",
        attention="norm_attn_norm.attn.",
        packing="blocks",
        names=Names(query="Wqkv", output="out_proj"),
        num_kv_heads=s.dbrx_kv_heads,
        set_kv=s.set_dbrx_kv,
        clip=r.clip_of,
    ),
)

_HYBRID = (
    # Attention layers among recurrent, convolutional or linear ones, which stay as they are.
    Family("bamba", rotary_dims=rotary_partial, has_attention=r.attends),
    Family("falcon_h1", residual_scale=r.scale_of("attention_out_multiplier"), notes="attention beside Mamba"),
    Family(
        "granitemoehybrid",
        rotary_dims=r.rotary_by_name,
        residual_scale=r.scale_of("residual_multiplier"),
        has_attention=r.attends,
    ),
    Family("jamba", pairing="none", rotary_dims=rotary_none, has_attention=r.attends),
    Family("lfm2", names=replace(_QK_LAYERNORM, output="out_proj"), key_norm="rms", has_attention=r.attends),
    Family("lfm2_moe", names=replace(_QK_LAYERNORM, output="out_proj"), key_norm="rms", has_attention=r.attends),
    Family(
        "lfm3",
        key_norm="rms",
        has_attention=r.attends,
        post_norm=lambda config: bool(config.use_sandwich_norm),
        query_extras=("g_proj.weight", "gate_proj.weight"),
        notes="output gate for each head",
    ),
    Family(
        "minimax",
        post_norm=True,
        residual_scale=s.minimax_scale,
        has_attention=r.attends,
    ),
    Family(
        "nemotron_h",
        layer_aliases=("backbone.layers.{i}.",),
        attention="mixer.",
        pairing="none",
        rotary_dims=rotary_none,
        has_attention=r.attends,
    ),
    Family(
        "olmo_hybrid", key_norm="rms_span", rotary_dims=r.rotary_if_parameters, has_attention=r.attends, post_norm=True
    ),
    Family("recurrent_gemma", attention="temporal_block.", rotary_dims=rotary_partial, has_attention=r.attends),
    *(
        Family(
            name,
            layer_aliases=("model.language_model.layers.{i}.",),
            key_norm="rms",
            norm_offset=1.0,
            rotary_dims=rotary_partial,
            has_attention=r.attends,
            gate_in_query=True,
            fixed_values=True,
            notes="output gate for each channel, stored in q_proj",
        )
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    ),
)

# Classes with only one KV head per query head; a host class replaces them (rehead.convert.hosts).
_HOSTED = (
    Family(
        "gpt_neox",
        layer="gpt_neox.layers.{i}.",
        attention="attention.",
        packing="groups",
        names=Names(query="query_key_value", output="dense"),
        rotary_dims=rotary_partial,
        num_kv_heads=query_heads,
        set_kv=s.set_no_kv,
        block=r.parallel_if("use_parallel_residual"),
        hosted=True,
        notes="as phi where its blocks are parallel, else as starcoder2 or nemotron",
    ),
    Family(
        "gptj",
        layer="transformer.h.{i}.",
        attention="attn.",
        names=Names(output="out_proj"),
        pairing="interleaved",
        rotary_dims=r.rotary_by_dims,
        num_kv_heads=query_heads,
        set_kv=s.set_no_kv,
        block="parallel",
        hosted=True,
        notes="as phi",
    ),
    Family(
        "codegen",
        layer="transformer.h.{i}.",
        attention="attn.",
        packing="quarters",
        names=Names(query="qkv_proj", output="out_proj"),
        pairing="interleaved",
        rotary_dims=r.rotary_by_dims,
        num_kv_heads=query_heads,
        set_kv=s.set_no_kv,
        block="parallel",
        hosted=True,
        notes="as phi",
    ),
    *(
        Family(
            name,
            layer=layer,
            attention=attention,
            names=Names(output="out_proj"),
            pairing="none",
            rotary_dims=rotary_none,
            num_kv_heads=query_heads,
            set_kv=s.set_no_kv,
            refusal=s.one_head_refusal,
            hosted=True,
            notes="to one KV head, as gpt_bigcode",
        )
        for name, layer, attention in (
            ("gpt_neo", "transformer.h.{i}.", "attn.attention."),
            ("opt", "model.decoder.layers.{i}.", "self_attn."),
            ("biogpt", "biogpt.layers.{i}.", "self_attn."),
            ("xglm", "model.layers.{i}.", "self_attn."),
        )
    ),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*_PLAIN, *_INTERLEAVED, *_NORMED, *_FUSED, *_HYBRID, *_HOSTED)
}
