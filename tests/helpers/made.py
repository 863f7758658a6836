"""Evaluations and training logs made up for the report's tests: plausible figures, nothing measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.report import Entry


def evaluation(
    kl: float = 0.2,
    kv_heads: int = 2,
    *,
    name: str = "out/converted",
    texts: tuple[str, ...] = ("speeches",),
    control: bool = False,
    tokens: float | None = None,
    method: str = "svd",
    full: bool = False,
    gates: list[dict[str, Any]] | None = None,
) -> Evaluation:
    """An evaluation of a model of 5 layers, 8 heads of 32, bf16, at a given KL to its original."""

    def facts(who: str, heads: int, **more: Any) -> dict[str, Any]:
        return {
            "name": who, "model_type": "llama", "parameters": 5_000_000 + 80_000 * heads, "weight_bytes": 10_000_000,
            "num_attention_heads": 8, "num_key_value_heads": [heads] * 5, "head_dim": 32,
            "kv_bytes_per_token": 2 * 5 * heads * 32 * 2, **more,
        }  # fmt: skip

    who_all = ["model", "baseline"] + ["control"] * control
    base = {"model": 40 * math.exp(kl), "baseline": 40.0, "control": 36.0}
    perplexity, divergence = [], []
    for i, text in enumerate(texts):
        for who in who_all:
            value = base[who] * (1 + i)
            ratio = value / (40.0 * (1 + i))
            perplexity.append({
                "who": who, "data": text, "convention": "disjoint", "value": value, "low": value * 0.97,
                "high": value * 1.03, "bits_per_byte": 1.2, "tokens": 32000, "window": 512, "stride": 512,
                "windows": 63, "dtype": "float32",
                "ratio": None if who == "baseline" else {"value": ratio, "low": ratio * 0.99, "high": ratio * 1.01},
            })  # fmt: skip
        for who in who_all:
            if who == "baseline":
                continue
            mean = (kl if who == "model" else 0.03) * (1 + 0.1 * i)
            edges = [0.0] + [1e-4 * 2**k for k in range(18)]
            counts = [int(2000 * math.exp(-((math.log(max(e, 5e-5)) - math.log(mean)) ** 2) / 3)) for e in edges[:-1]]
            divergence.append({
                "who": who, "data": text, "tokens": sum(counts), "window": 512, "mean": mean, "low": mean * 0.95,
                "high": mean * 1.05, "median": mean / 2, "p99": mean * 6, "p999": mean * 12, "max": mean * 30,
                "top1_agreement": max(0.02, 1 - 0.5 * mean**0.5),
                "delta_p": {"mean": -0.01, "std": 0.1, "p1": -0.4, "p5": -0.2, "p95": 0.1, "p99": 0.2},
                "histogram": {"edges": edges, "counts": counts},
            })  # fmt: skip
    table: dict[str, Any] = {
        "model": facts(name, kv_heads, conversion={"options": {"method": method, "refit": method == "svd", "fit": 0}},
                       uptraining={"tokens": tokens} if tokens else None),
        "baseline": facts("models/embedded", 8),
        "control": facts("out/control", 8, uptraining={"tokens": tokens}) if control else None,
        "conditions": {
            "device": "cpu", "dtype": "float32", "attention": "sdpa", "seed": 0, "threads": 2,
            "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "rehead": "0.1.0"},
            "data": [{"name": text, "tokens": 32000, "bytes": 140000} for text in texts],
            "date": "2026-01-02T03:04:05Z",
        },
        "perplexity": perplexity,
        "divergence": divergence,
        "gates": gates or [],
    }  # fmt: skip
    name_of = ("United Kingdom", "French", "Sublime Porte")
    if full:
        table["damage"] = [{"layer": i, "kl": kl / (3 + i), "top1_agreement": 0.9, "tokens": 4096} for i in range(5)]
        table["needle"] = [
            {"who": who, "length": length, "depth": depth, "hits": 8 - i, "trials": 10}
            for who in ("model", "baseline") for i, length in enumerate((256, 512, 1024)) for depth in (0.0, 0.5, 1.0)
        ]  # fmt: skip
        table["recall"] = [
            {"who": who, "kind": kind, "distance": distance, "top1": 0.9 - 0.2 * i, "nll": 1.0 + i, "tokens": 504}
            for who in ("model", "baseline") for kind in ("copy", "pairs") for i, distance in enumerate((256, 1024))
        ]  # fmt: skip
        table["tasks"] = [
            {"who": who, "task": "arc_easy", "metric": "acc", "value": value, "stderr": 0.01, "samples": 500}
            for who, value in (("model", 0.41), ("baseline", 0.44))
        ]
        table["kv_cache"] = [
            {"who": who, "computed_bytes_per_token": 640 * heads, "measured_bytes_per_token": 640 * heads,
             "dtype": "bfloat16"} for who, heads in (("model", kv_heads), ("baseline", 8))
        ]  # fmt: skip
        table["samples"] = [
            {"data": texts[0], "position": 100 * at, "prompt": f"The year {1790 + at} brought peace, commerce and",
             "truth": " revenues beyond all expectation.", "continuations": [
                 {"who": "baseline", "text": f" a treaty with the {name_of[at]}.", "tokens": 8},
                 {"who": "model", "text": " a treaty with bales and bales.", "tokens": 7, "same": 3,
                  "same_text": " a treaty with"},
             ]} for at in range(3)
        ]  # fmt: skip
        table["speed"] = [
            _speed(who, heads, phase, speed, batch, context)
            for who, heads in (("model", kv_heads), ("baseline", 8))
            for phase, speed in (("prefill", 9000), ("decode", 90))
            for batch in (1, 16) for context in (512, 2048, 8192)
        ]  # fmt: skip
    return Evaluation.model_validate(table)


def _speed(who: str, heads: int, phase: str, speed: float, batch: int, context: int) -> dict[str, Any]:
    own, original = (speed * batch**0.8 / (1 + context / (4000 * 8 / heads)) for heads in (heads, 8))
    ratio = own / original
    return {
        "who": who, "phase": phase, "batch": batch, "context": context, "repeats": 6, "seconds": 0.01,
        "tokens_per_second": own, "low": 0.97 * own, "high": 1.02 * own,
        "ratio": None if who == "baseline" else {"value": ratio, "low": 0.95 * ratio, "high": 1.04 * ratio},
    }  # fmt: skip


def sweep(full: bool = True) -> list[Entry]:
    """Two methods at three sizes, before and after uptraining."""
    entries = []
    for heads in (4, 2, 1):
        for method, hurt in (("mean", 3.0), ("svd", 1.0)):
            for stage, left in (("converted", 1.0), ("uptrained", 0.25)):
                found = evaluation(
                    0.6 * hurt * left / heads**0.8, heads, name=f"out/{method}-{heads}-{stage}", method=method,
                    full=full, control=stage == "uptrained", tokens=1e6 if stage == "uptrained" else None,
                    texts=("built-in:heldout", "novel"),
                )  # fmt: skip
                entries.append(Entry(f"{heads} KV head{'s' * (heads > 1)}, {method}, {stage}", found, method, stage))
    return entries


def training_log(path: Path, start: float = 1.0, steps: int = 40, evaluated: bool = True) -> Path:
    """A training log with a step event each, and an evaluation every ten."""
    events: list[dict[str, Any]] = [{"event": "start", "tokens": 1_000_000, "versions": {"torch": "2.13.0"}}]
    for step in range(1, steps + 1):
        tokens, loss = 25_000 * step, start / (1 + step / 4)
        events.append({"event": "step", "step": step, "tokens": tokens, "loss": loss, "learning_rate": 1e-3})
        if evaluated and step % 5 == 0:
            events.append({"event": "evaluation", "step": step, "tokens": tokens, "kl": loss * 1.1, "data": "speeches"})
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path
