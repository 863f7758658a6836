"""What a model is, as far as its attention goes, and what can be done with it: from config and headers alone."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from rehead.convert.hosts import hosts_of
from rehead.models.config import resolve_config
from rehead.models.families import FAMILIES, REFUSALS
from rehead.models.families.latent import LATENT
from rehead.models.families.remote import REMOTE
from rehead.models.families.seq2seq import SEQ2SEQ
from rehead.models.layout import bytes_per_token, sizes, windows
from rehead.models.meta import draft_layers
from rehead.models.model import model_of, open_model
from rehead.models.remote import layout_facts, open_known


def inspect(model: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Describe a model without reading a weight.

    Args:
        model: a local folder or a Hub id.
        revision: Hub revision.

    Returns:
        Plain JSON: model type, layers, heads, ``head_dim``, parameters, bytes, dtypes, block shape, positions, key
        norm, KV-cache bytes per token (from the real ``head_dim``, over attention layers, while no window is full)
        and at several contexts, the numbers of KV heads that
        it can be converted to with the cache each leaves, and the classes that may stand in for its own.

    Raises:
        UsageError: no such model.
        UnsupportedError: it cannot be converted; the line says why.
    """
    source = open_known(model, revision)
    config = resolve_config(source.config, source.id)
    latent = config.model_type in LATENT
    opened = model_of(source, config, LATENT[config.model_type]) if latent else open_model(source)
    config, family = opened.config, opened.family
    kv, layouts = opened.num_kv_heads, opened.layouts
    first = opened.layers[0] if opened.layers else 0
    rotary = [family.rotary_dims(config, layer) for layer in opened.layers]
    choices, refusals = {}, set()
    if latent:
        refusals.add(REFUSALS[config.model_type].reason)
    for count in (n for n in range(1, kv) if kv % n == 0):
        reason = family.refusal(config, count)
        if reason:
            refusals.add(reason)
        else:
            choices[str(count)] = bytes_per_token([layer.with_heads(count) for layer in layouts])
    kind = "multi-head" if kv == opened.num_heads else "multi-query" if kv == 1 else "grouped-query"
    if kv == 1 and opened.num_heads == 1:
        kind = "single-head"
    kind = "multi-head latent" if latent else kind
    dtypes = Counter(info.dtype for info in source.stored.values())
    return {
        "model": source.id,
        "revision": source.revision,
        "model_type": config.model_type,
        "attention": kind,
        "layers": config.num_hidden_layers,
        "attention_layers": len(opened.layers),
        "num_attention_heads": opened.num_heads,
        "num_key_value_heads": kv,
        "head_dim": opened.head_dim,
        "hidden_size": getattr(config, "hidden_size", None),
        "parameters": opened.parameters(),
        "bytes": sum(info.nbytes for info in source.stored.values()),
        "dtypes": dict(dtypes),
        "block": family.block_of(config),
        "positions": _positions(family.pairing, rotary, opened.head_dim),
        "key_norm": family.norm_of(config),
        "packing": family.packing,
        "biases": [name.rsplit(".", 2)[-2] for name in opened.layer_tensors(first) if name.endswith(".bias")],
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "kv_bytes_per_token": bytes_per_token(layouts),
        "windows": windows(layouts),
        "cache_bytes": sizes(layouts),
        "can_convert_to": choices,
        "cannot": sorted(refusals),
        "ignored": sorted(source.ignored),
        "drafts": draft_layers(source),
        "hosts": hosts_of(config.model_type),
        **({"layout": facts} if (facts := layout_facts(source)) else {}),
    }


def describe_families() -> list[dict[str, Any]]:
    """Every architecture in the table: model type, packing, key norm, rotary pairing, tensor names and notes."""
    rows = []
    for family in sorted((*FAMILIES.values(), SEQ2SEQ["t5"]), key=lambda family: family.model_type):
        names = family.names
        stems = [names.query, names.output]
        if family.packing == "separate":
            stems[1:1] = [names.key, names.value]
        rows.append(
            {
                "model_type": family.model_type,
                "packing": family.packing,
                "key_norm": family.key_norm if isinstance(family.key_norm, str) else "by config",
                "positions": "no rotary" if family.pairing == "none" else f"rotary, {family.pairing}",
                "block": family.block if isinstance(family.block, str) else "by config",
                "tensors": [f"{family.layer}{family.attention}{stem}.weight" for stem in stems],
                "notes": family.notes,
            }
        )
    for model_type, layout in REMOTE.items():
        host = next(row for row in rows if row["model_type"] == layout.host)
        rows.append({**host, "model_type": model_type, "notes": f"published with remote code; read as {layout.host}"})
    return rows


def _positions(pairing: str, rotary: list[int], head_dim: int) -> str:
    """RoPE in words: its pairing, how much of a head turns, and in how many layers."""
    turning = [dims for dims in rotary if dims]
    if pairing == "none" or not turning:
        return "no rotary positions"
    share = "" if turning[0] == head_dim else f", {turning[0]} of {head_dim} dimensions"
    layers = "" if len(turning) == len(rotary) else f", in {len(turning)} of {len(rotary)} layers"
    return f"rotary ({pairing}{share}{layers})"
