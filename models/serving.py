"""Which engines give the same tokens as transformers for a class of model, as they were run.

``make engines`` (``benchmarks/engines``) runs them and writes ``serving.json`` beside this file; cards and README read it.
A class serves or fails by what its config says besides the type, so a run counts only for configs with equal facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

SAME = "same tokens"
DIFFERENT = "different tokens"
REFUSED = "refused"

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Run:
    """What one engine did with one small model.

    Attributes:
        engine, version: by the names that they report.
        outcome: :data:`SAME`, :data:`DIFFERENT` or :data:`REFUSED`.
        tokens, of: greedy tokens equal to transformers' before the first that differs, of so many.
        logprob_difference: largest difference of a token's log-probability (nats) among those; None where not given.
        cache_bytes_per_token: float32, all layers, as the engine reports them; None where it does not.
        notes: what the client had to do, or the engine's reason for its refusal.
        case: the model that was run, by its name in ``benchmarks/engines/cases.py``.
    """

    engine: str
    version: str
    outcome: str
    tokens: int
    of: int
    logprob_difference: float | None
    cache_bytes_per_token: float | None
    notes: tuple[str, ...]
    case: str


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What, besides the type, decides whether an engine's class of the same name computes the same.

    Args:
        config: a checkpoint's ``config.json``; of a config's defaults only those that it spells out are seen.
    """
    heads, kv = _first(config, _HEADS), _first(config, _KV_HEADS)
    if config.get("multi_query") and config.get("model_type") in ("gpt_bigcode", "falcon"):
        kv = kv if config.get("new_decoder_architecture") else 1
    if config.get("kv_lora_rank"):
        sharing = "latent"
    elif not kv or kv == heads:
        sharing = "MHA"
    else:
        sharing = "MQA" if kv == 1 else "GQA"
    return {
        "attention": sharing,
        "activation": _first(config, _ACTIVATIONS),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "custom_code": bool(config.get("auto_map")),
    }


def served_by(model_type: str, facts: Mapping[str, Any]) -> list[Run]:
    """The runs that hold for a model, in the order in which engines are listed; empty where none was run.

    Args:
        model_type: as in ``config.model_type``.
        facts: of :func:`facts_of`. Groups of any size count as the same sharing; a fact that is absent matches all.
    """
    runs: dict[tuple[str, str], Run] = {}
    for row in results()["rows"]:
        known = row["facts"]
        if row["model_type"] != model_type or any(known.get(key) != value for key, value in facts.items()):
            continue
        for run in row["runs"]:
            values = {**run, "notes": tuple(run["notes"]), "case": row["case"]}
            runs.setdefault((row["case"], run["engine"]), Run(**values))
    return list(runs.values())


@cache
def results() -> dict[str, Any]:
    """The recorded runs: ``versions``, ``date`` and ``rows``, one for each small model."""
    return json.loads(files("rehead.models").joinpath("serving.json").read_text(encoding="utf-8"))


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
