"""Latent attention as changes of a checkpoint: first every layer at its natural scale, then as its host stores it.

Between the two stands the model in its own class with :class:`~rehead.variants.latent.module.LatentAttention` in the
place of each attention, which is what recovers; the second step is exact, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.source import torch_dtype
from rehead.errors import UnsupportedError
from rehead.models.families.latent import LATENT
from rehead.models.families.layouts import shared_norm_names, tensor_names
from rehead.models.families.parallel import PREFIX, base_type
from rehead.models.families.spec import rope_parameters
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, Derived, LayerForm, Read, Rewrite
from rehead.variants.latent.angles import angles_of
from rehead.variants.latent.export import is_biased, latent_config, layer_tensors, stream_scale, wants_two_factors
from rehead.variants.latent.heads import LatentHeads
from rehead.variants.latent.linear import made_linear, needs_of
from rehead.variants.latent.module import RECOVERY, LatentAttention, module_weights, with_module_weights
from rehead.variants.latent.norms import LEAST_R2
from rehead.variants.latent.options import LatentOptions
from rehead.variants.latent.settle import kept_pairs, settle
from rehead.variants.latent.sizes import LatentSizes
from rehead.variants.latent.solve import solve
from rehead.variants.layer_choice import layers_among

#: Classes that compute what the hosts do around the attention: pre-norm blocks, RMSNorm with plain weights, gated FFNs,
#: no multipliers. Each is proved by a test of its own.
SOURCES = ("llama", "mistral", "qwen2", "qwen3")

#: A source's tensors below a layer that have the same place in the hosts.
_FFN = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_WRITER = "mlp.down_proj"

#: Context for which arithmetic is counted.
CONTEXT = 8192


def check_source(model: Model) -> None:
    """Refuse a model that no latent host holds.

    Raises:
        UnsupportedError: with the reason and what can be done instead.
    """
    kind = base_type(model.config.model_type)
    if model.config.model_type.startswith(PREFIX):
        raise UnsupportedError(
            f"{model.config.model_type}: {' and '.join(LATENT)} have no parallel blocks; convert it from before that"
        )
    if kind not in SOURCES:
        raise UnsupportedError(
            f"{kind}: its blocks compute what {' and '.join(LATENT)} have no place for; latents are for "
            f"{', '.join(SOURCES)}; share KV heads instead (--kv-heads)"
        )


def span(model: Model) -> tuple[int, int]:
    """(numbers that a model caches per token and layer, the largest rank that has a use)."""
    numbers = 2 * model.num_kv_heads * model.head_dim
    return numbers, min(numbers, int(model.config.hidden_size))


def latent(
    model: Model,
    options: LatentOptions,
    angles: Tensor,
    refits: bool,
    fits: bool,
    layers: Sequence[int] | None = None,
    dtype: str | None = "F32",
) -> Rewrite:
    """Layers' attention as latent attention at its natural scale, computed over calibration text.

    Args:
        options: with rank and rotary dimensions; see :func:`~rehead.variants.latent.settle.settle`.
        angles: of :func:`~rehead.variants.latent.angles.angles_of`.
        refits: the FFN's output is refitted too.
        fits: the layers are fitted, which makes up for queries and keys that are far from linear.
        layers: which; all when None.
        dtype: safetensors dtype code of what is computed; None for the source's.

    Raises:
        UnsupportedError: a tensor has no place in the host.
    """
    check_source(model)
    assert options.rank is not None
    headers, family, rank = model.source.tensors, model.family, options.rank
    kept = kept_pairs(options, angles)
    chosen = model.layers if layers is None else list(layers)
    extras = (family.prefix(layer) + name for layer in chosen for name in family.query_extras)
    if (lost := next((name for name in extras if name in headers), None)) is not None:
        raise UnsupportedError(f"{lost}: latents have no place for it; name other layers, or leave it out before")
    like = _shapes(model, options, angles, kept, chosen[0])
    named = module_weights(like)
    normed = family.norm_of(model.config) != "none"
    tensors: dict[str, Derived] = {}
    for name, info in headers.items():
        layer = _layer_of(model, name)
        if layer is None or layer not in chosen:
            tensors[name] = Derived((name,), info.shape)
            continue
        if name in shared_norm_names(family, model.config, layer, headers):
            continue  # the linear queries and keys have them in
        old = tuple(tensor_names(family, model.config, layer, headers))
        below = name.removeprefix(family.layer.format(i=layer))
        if name in old:
            for new, weight in named.items():
                place = family.prefix(layer) + new
                tensors.setdefault(place, Derived(old, tuple(weight.shape), layer=layer, dtype=dtype))
        elif below == f"{_WRITER}.weight" and refits:
            tensors[name] = Derived((name,), info.shape, layer=layer, dtype=dtype)
        elif below in (*_FFN, *_NORMS, f"{_WRITER}.weight"):
            tensors[name] = Derived((name,), info.shape)
        else:
            raise UnsupportedError(
                f"{name}: has no place in {options.host}, its host; give a plain {model.config.model_type}"
            )

    def closed(layer: int, heads: Heads, moments: Any) -> Changed:
        plain, costs = made_linear(heads, moments, options.fold_biases, 0.0 if fits else LEAST_R2)
        solution = solve(plain, moments, angles, kept, rank)
        whole = float(solution.spectrum.sum()) + solution.rotary_loss
        weights = module_weights(solution.latent.to(torch.float32))
        facts = {"lost": round(solution.loss(rank) / max(whole, 1e-30), 6), **costs}
        return Changed({family.prefix(layer) + name: weight for name, weight in weights.items()}, facts)

    form = LayerForm(
        closed,
        needs=needs_of(normed),
        groups=1,
        calibrated=True,
        module=lambda: LatentAttention(like),
        writers=(_WRITER,),
        settings=RECOVERY,
    )
    source = model.source.config
    facts = _facts(model, options, angles, chosen)
    return Rewrite(
        "latent", dict(source), family, tensors, None, exact=False, layers=tuple(chosen), facts=facts, form=form
    )


def latent_beside(model: Model, options: LatentOptions) -> Rewrite:
    """Some layers with latent attention beside others; the model is in the class with Rehead's modelling file."""
    angles = angles_of(model)
    settled = settle(options, angles, *span(model))
    count = int(model.config.num_hidden_layers)
    layers = layers_among(options.layers, count, model.layers)
    rewrite = latent(model, settled, angles, refits=False, fits=False, layers=layers, dtype=None)
    kept = kept_pairs(settled, angles)
    biases = [name for name in _shapes(model, settled, angles, kept, layers[0]).weights() if name.endswith("_bias")]
    sizes = {"rank": settled.rank, "pairs": kept.tolist(), "biases": biases}
    raw = dict(model.source.config)
    others = raw.get("layer_latents") or [None] * count
    raw["layer_latents"] = [sizes if layer in layers else other for layer, other in enumerate(others)]
    return replace(rewrite, config=raw)


def stored(live: Model, source: Model, options: LatentOptions, angles: Tensor, code: str | None) -> Rewrite:
    """The same in its host's class.

    Args:
        live: the model as :func:`latent` leaves it.
        source: the model that it was made of.
        code: safetensors dtype of all floating-point tensors, or None for the source's.

    Raises:
        UnsupportedError: the host has no place for something of the model, or the dtype no room for the latent's scale.
    """
    config, headers = source.config, source.source.tensors
    kept = kept_pairs(options, angles)
    like = _shapes(source, options, angles, kept, source.layers[0])
    raw = {**config.to_dict(), **source.source.config}
    tied = bool(config.tie_word_embeddings)
    # vLLM has no tied head in this class, and computes with one of zeros.
    untied = tied and options.host == "deepseek_v3" and options.engine == "vllm"
    raw |= {"tie_word_embeddings": tied and not untied}
    scale = stream_scale(float(config.rms_norm_eps), tied and not untied)
    rope = rope_parameters(config, source.layers[0]) if len(kept) == len(angles) else None
    two = wants_two_factors(options.engine, int(config.num_hidden_layers), int(config.vocab_size))
    if options.engine is not None and is_biased(like):
        raise UnsupportedError(
            f"--for {options.engine}: the model's queries, keys or values have biases, which {options.engine} does not "
            "read in this class; leave it out and serve with transformers"
        )
    result = latent_config(raw, options.host, like, rope=rope, two_factors=two)
    family = source.family
    tensors: dict[str, Derived] = {}
    rounds = scale.writers != 1
    first = tensor_names(family, config, source.layers[0], headers)[0]
    stored_as = code or headers[first].dtype
    if stored_as == "F16" and not options.half_scale:
        raise UnsupportedError(
            f"{source.source.id}: float16 has no room for the scale at which {options.host} must store a latent "
            "(its rows would underflow); give --dtype bfloat16 or float32, or --half-scale to be a hundredth off"
        )
    dtype = torch_dtype(stored_as)
    names = list(module_weights(like))
    shapes = layer_tensors(like, "", dtype, writers=scale.writers, two_factors=two)
    for name, derived in live.source.tensors.items():
        at = _layer_of(source, name)
        kind = code or (headers[name].dtype if name in headers else stored_as)
        if at is not None and name.startswith(family.prefix(at)):
            sources = tuple(family.prefix(at) + each for each in names)
            for new, tensor in shapes.items():
                place = family.prefix(at) + new
                tensors.setdefault(place, Derived(sources, tuple(tensor.shape), layer=at, dtype=stored_as))
        else:
            compute: Callable[..., Tensor] | None = None
            if (at is not None and _WRITER in name) or name.endswith("embed_tokens.weight"):
                compute = _times(scale.writers) if scale.writers != 1 else None
            elif at is None and name.endswith("norm.weight"):
                compute = _times(scale.final_norm) if scale.final_norm != 1 else None
            tensors[name] = Derived((name,), derived.shape, compute, dtype=kind)
            if untied and name.endswith("embed_tokens.weight"):
                tensors["lm_head.weight"] = Derived((name,), derived.shape, None, dtype=kind)

    def step(layer: int, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
        prefix = family.prefix(layer)
        weights = with_module_weights(like, {name: read(prefix + name).double() for name in names})
        return layer_tensors(weights, prefix, dtype, writers=scale.writers, two_factors=two), {}

    if code is not None:
        result["dtype"] = str(dtype).removeprefix("torch.")
        result.pop("torch_dtype", None)
    facts = {"before": config.model_type, "after": options.host}
    return Rewrite("stored", result, LATENT[options.host], tensors, step, rounds=rounds, facts=facts, dtype=code)


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.double() * factor


def _layer_of(model: Model, name: str) -> int | None:
    start, _, end = model.family.layer.partition("{i}")
    index = name.removeprefix(start).partition(end)[0]
    return int(index) if name.startswith(start) and index.isdigit() else None


def _shapes(model: Model, options: LatentOptions, angles: Tensor, kept: Tensor, layer: int) -> LatentHeads:
    """What becomes of a layer, as shapes alone."""
    assert options.rank is not None
    assert options.rope_dims is not None
    heads = model.layer_on_meta(layer)
    count, size, rank, turning = heads.num_heads, heads.head_dim, options.rank, options.rope_dims
    width, folds = heads.q.shape[-1], options.fold_biases
    q_bias, k_bias = (
        bias is not None and not folds and heads.key_norm == "none" for bias in (heads.q_bias, heads.k_bias)
    )
    v_bias = heads.v_bias is not None and not folds
    make = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    biased = q_bias or k_bias
    return LatentHeads(
        down=make(rank, width),
        rope=make(turning, width),
        q_nope=make(count, size, width),
        q_rope=make(count, turning, width),
        key_up=make(count, size, rank),
        value_up=make(count, size, rank),
        o=make(heads.o.shape[0], count, size),
        frequencies=angles.double()[kept],
        scaling=size**-0.5,
        down_bias=make(rank) if biased else None,
        rope_bias=make(turning) if k_bias else None,
        q_nope_bias=make(count, size) if q_bias else None,
        q_rope_bias=make(count, turning) if q_bias else None,
        o_bias=make(heads.o.shape[0]) if v_bias or heads.o_bias is not None else None,
    )


def _facts(model: Model, options: LatentOptions, angles: Tensor, layers: Sequence[int]) -> dict[str, Any]:
    """Sizes and arithmetic for the plan and the manifest."""
    assert options.rank is not None
    assert options.rope_dims is not None
    heads, size, kv, count = model.num_heads, model.head_dim, model.num_kv_heads, len(layers)
    width = int(model.config.hidden_size)
    sizes = LatentSizes(width, heads, options.rank, options.rope_dims, size, size)
    plain = 2 * (width * size * (2 * heads + 2 * kv) + CONTEXT * heads * 2 * size)
    two = wants_two_factors(options.engine, len(model.layers), int(model.config.vocab_size))
    more = 2 * width * width if two else 0
    return {
        "rank": options.rank,
        "rope_dims": options.rope_dims,
        "pairs": [options.rope_dims // 2, len(angles)],
        "host": options.host,
        "numbers_per_token": {"before": 2 * kv * size, "after": sizes.numbers_per_token},
        "attention_flops": {
            "context": CONTEXT,
            "before": plain * count,
            "after": (sizes.decode_flops(CONTEXT) + more) * count,
            "expanded": (sizes.decode_flops(CONTEXT, absorbed=False) + more) * count,
        },
    }
