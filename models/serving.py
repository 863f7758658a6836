"""Which serving engines gave the same tokens as transformers for a class of model when they were run.

``make engines`` (``benchmarks/engines``) runs them and writes ``serving.json`` beside this file; cards and README read
it. Whether an engine serves a class correctly depends on more of its config than the type, so a run counts only for
configs with the same facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from rehead.models.families.spec import rope_sets

SAME = "same"
DIFFERENT = "different"
REFUSED = "refused"

EngineName = Literal["vllm", "llama.cpp", "transformers"]
"""What ``--for`` takes."""
#: Engines that a model can be converted for, as ``--for`` names them -> as the records do.
ENGINE_NAMES = {"llama.cpp": "llama.cpp", "vllm": "vLLM"}

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_proj")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_EQUAL_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Run:
    """What one engine did with one small model.

    Attributes:
        engine, version: as the engine reports them.
        outcome: :data:`SAME`, :data:`DIFFERENT` or :data:`REFUSED`.
        tokens, of: greedy tokens equal to transformers' before the first difference, and how many were generated.
        logprob_difference: largest difference of their log-probabilities (nats); None where the engine gives none.
        cache_bytes_per_token: float32, all layers, as the engine reports them; None where it does not.
        notes: what the client had to do, or the engine's reason for its refusal.
        case: the model that was run, by its name in ``benchmarks/engines/cases.py``.
        tested: ``windows``, ``sinks``, ``stretched RoPE``: those that the model has and whose loss would have shown in
            the answer.
        short_text: whether the text was one that the model could read before its RoPE was stretched. Only kinds of RoPE
            that read such texts as before have a run of this sort, beside one on a longer text.
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
    tested: tuple[str, ...] = ()
    short_text: bool = False


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a ``config.json`` that, besides the type, decide whether an engine computes the model correctly.

    Only keys in the file count, not the class's defaults.
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
    activation = _first(config, _ACTIVATIONS)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    width = _first(config, ("hidden_size", "n_embd"))
    context = _first(config, ("max_position_embeddings", "n_positions")) or 0
    return {
        "attention": sharing,
        "activation": _EQUAL_ACTIVATIONS.get(activation, activation),
        "custom_code": bool(config.get("auto_map")),
        "windows": 0 < (config.get("sliding_window") or 0) < context and config.get("use_sliding_window", True),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "rope_type": _rope_type(rope),
        "says_mscale": "long_mscale" in rope,
        "usual_rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)) == 10000.0,
        "ffn_is_4_times_as_wide": _first(config, ("intermediate_size", "n_inner")) in (None, 4 * (width or 0)),
        "query_latent": config.get("q_lora_rank") is not None,
        "has_26_or_27_layers": bool(config.get("kv_lora_rank")) and config.get("num_hidden_layers") in (26, 27),
        "latent_biases": bool(config.get("kv_lora_rank") and config.get("attention_bias")),
        "window_period": _window_period(config.get("layer_types") or ()),
    }


# Facts that must always agree; others count only for types whose runs differ in them.
_DECIDING = ("attention", "activation", "custom_code", "windows", "rope_type")


def served_by(config: Mapping[str, Any], **assumed: Any) -> list[Run]:
    """The recorded runs that apply to a model, in the order of the engines; empty if there are none.

    Args:
        config: the model's ``config.json``.
        assumed: facts (:func:`facts_of`) that are taken to be others.
    """
    facts = facts_of(config) | assumed
    rows = [row for row in results()["rows"] if row["model_type"] == config.get("model_type")]
    for key in dict.fromkeys([*_DECIDING, *facts]):
        if key in _DECIDING or len({row["facts"].get(key) for row in rows}) > 1:
            rows = [row for row in rows if row["facts"].get(key) == facts.get(key)]
    return [
        Run(
            **{**run, "notes": tuple(run["notes"]), "case": row["case"], "tested": tuple(row.get("tested", ()))},
            short_text=row.get("short_text", False),
        )
        for row in rows
        for run in row["runs"]
    ]


def deciding_runs(config: Mapping[str, Any], short_text: bool = False, **assumed: Any) -> dict[str, Run]:
    """One run of :func:`served_by` for each engine, by its name: the first.

    Args:
        config, assumed: as there.
        short_text: of those runs, where there are any, rather than of all others.
    """
    first: dict[str, Run] = {}
    for run in served_by(config, **assumed):
        if run.short_text == short_text:
            first.setdefault(run.engine, run)
    return first


def sentences(config: Mapping[str, Any]) -> list[str]:
    """Lines about engines for the card of a model with this ``config.json``: one per engine, or that none was run."""
    short = deciding_runs(config, short_text=True)
    lines = []
    for name, run in deciding_runs(config).items():
        if run.outcome == SAME:
            text = f"{run.tokens} of {run.of} greedy tokens as transformers gives them"
            if parts := [part for part in ("windows", "sinks", "stretched RoPE") if part in run.tested]:
                text += f", {' and '.join(parts)} computed"
            if name in short and short[name].outcome != SAME:
                text += "; not so on texts of the original length and shorter"
                text += f" ({'; '.join(short[name].notes)})" if short[name].notes else ""
        elif run.outcome == DIFFERENT:
            text = "loads it and computes something else: do not use it"
        else:
            text = f"does not take it ({'; '.join(run.notes)})"
        extra = [note for note in run.notes if run.outcome != REFUSED]
        lines.append(f"{run.engine} {run.version}: {text}" + (f" ({'; '.join(extra)})" if extra else ""))
    return lines or ["no engine has been run on a model of this kind"]


def engines(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """What engines made of a model of this kind when they were run: their names under ``right``, ``wrong``, ``refuse``.

    Args:
        config: the model's ``config.json``.
    """
    runs = deciding_runs(config)
    kinds = {"right": SAME, "wrong": DIFFERENT, "refuse": REFUSED}
    return {kind: [name for name, run in runs.items() if run.outcome == wanted] for kind, wanted in kinds.items()}


def engine_line(outcomes: Mapping[str, Sequence[str]]) -> str:
    """:func:`engines` in one line."""
    words = {
        "right": "read it right",
        "wrong": "load it and compute something else: do not use them",
        "refuse": "refuse",
    }
    said = [f"{', '.join(outcomes[kind])}: {text}" for kind, text in words.items() if outcomes.get(kind)]
    return "; ".join(said) or "none was run on a model of this kind"


@cache
def results() -> dict[str, Any]:
    """The recorded runs: ``versions``, ``date`` and ``rows``, one for each small model."""
    return json.loads(files("rehead.models").joinpath("serving.json").read_text(encoding="utf-8"))


def _window_period(kinds: Sequence[str]) -> int | None:
    """Layers from one that sees everything to the next; None without windows."""
    return kinds.index("full_attention") + 1 if {"full_attention", "sliding_attention"} <= set(kinds) else None


def _rope_type(rope: Mapping[str, Any]) -> str:
    """How rotary frequencies are stretched; of a config with a set for each kind of layer, in any of them."""
    types = [str(each.get("rope_type") or each.get("type") or "default") for each in rope_sets(rope)]
    return next((name for name in types if name != "default"), "default")


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
