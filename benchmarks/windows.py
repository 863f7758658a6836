"""What windows cost, live and saved: divergence and recall by distance, the bytes of the cache, and real memory.

::

    python -m rehead.benchmarks.windows MODEL --text speeches.txt --text docs.rst --calibration other.txt

One table: all layers under a window, with and without a fitted sink logit (``--part plain``), and the same with sink
tokens (``sinks``); some layers by rules that look at nothing (``rules``); as many layers as ``--share`` says in a
checkpoint, chosen and recovered (``saved``); the memory of a long generation on a GPU (``memory``).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.benchmarks.machine import machine
from rehead.console import echo, print_columns
from rehead.data.tokens import load_tokenizer, token_stream
from rehead.models.cache_layouts import config_layouts
from rehead.models.layout import cache_bytes
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.models.recall import Recall, RecallText, fitting, recall, recall_texts
from rehead.patches import patch_model
from rehead.recipes.evaluation.divergence import compare
from rehead.recipes.evaluation.models import open_named
from rehead.recipes.evaluation.needle import word_tokens
from rehead.variants.layer_choice import parse_layers
from rehead.variants.window.sink_logit import OFF

CONTEXT = 32768


class Judge:
    """Measures models beside an original on the same texts.

    Args:
        original: a live model.
        texts: tokens by name.
        recalled: texts to recall from.
        length: tokens read at once.
    """

    def __init__(self, original: Any, texts: dict[str, Tensor], recalled: list[RecallText], length: int) -> None:
        self.original, self.texts, self.recalled, self.length = original, texts, recalled, length
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, model: Any, **facts: Any) -> None:
        """Measure a model and keep the row."""
        row: dict[str, Any] = {"name": name, **facts}
        for text, tokens in self.texts.items():
            if model is self.original:
                row[text] = {"kl": 0.0, "ratio": 1.0}
                continue
            apart = compare(self.original, {"model": model}, tokens, self.length)["model"]
            row[text] = {"kl": apart.kl, "ratio": apart.perplexity / apart.baseline_perplexity}
        row["recall"] = [each.to_dict() for each in recall(model, self.recalled)]
        self.rows.append(row)
        echo(json.dumps(row))


def live_rows(judge: Judge, load: Any, window: int, sinks: int, tokens: Tensor) -> None:
    """All layers of a live model under a window, with and without a logit; with sink tokens unless ``sinks`` is 0."""
    model = load()
    beside = f" + {sinks} sinks" if sinks else ""
    for name, options in {"": {}, " + logit": {"sink_logit": True}}.items():
        with patch_model(model, "window", size=window, sinks=sinks, calibration=tokens, **options) as patch:
            heads = [state.tensors["sinks"] > OFF for state in patch.states if state.tensors]
            told = {"heads_with_logits": sum(int(some.sum()) for some in heads)} if heads else {}
            judge.add(f"live, all layers, {window}{beside}{name}", model, **told)


def rule_rows(judge: Judge, load: Any, window: int, count: int, tokens: Tensor) -> None:
    """Some layers of a live model under a window with a logit, by rules that look at nothing."""
    model, depth = load(), judge.original.config.num_hidden_layers
    rules = {"every other": range(1, depth, 2), "first": range(count), "last": range(depth - count, depth)}
    for name, layers in rules.items():
        chosen = list(layers)
        with patch_model(model, "window", size=window, layers=chosen, sink_logit=True, calibration=tokens):
            judge.add(f"live, {name} ({len(chosen)} layers), {window} + logit", model)


def peak_bytes(model: Any, tokens: Tensor, steps: int) -> dict[str, int]:
    """Memory of a generation on a GPU, in bytes, beyond what was there before it.

    Returns:
        ``cache``: what is held once ``tokens`` are read in pieces; ``peak``: the most that decoding holds.
    """
    from transformers import DynamicCache

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in tokens.split(2048, 1):
            model(piece, use_cache=True, logits_to_keep=1, **cache_argument(cache))
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        token = tokens[:, -1:]
        for _ in range(steps):
            token = model(token, use_cache=True, **cache_argument(cache)).logits[:, -1:].argmax(-1)
    return {"cache": held, "peak": torch.cuda.max_memory_allocated() - before}


def memory_rows(load: Any, window: int, sinks: int, context: int) -> list[dict[str, Any]]:
    """Memory of a long generation with and without windows, beside what the layouts say."""
    from rehead.variants.window import VARIANT, WindowOptions

    model = load(torch.bfloat16)
    layers = config_layouts(model.config) or []
    tokens = torch.randint(8, model.config.vocab_size, (1, context), device=model.device)
    options = WindowOptions(size=window, sinks=sinks)
    rows = [{"name": "all keys", "planned": cache_bytes(layers, context), **peak_bytes(model, tokens, 16)}]
    with patch_model(model, "window", size=window, sinks=sinks):
        planned = cache_bytes([VARIANT.layout(layer, options) for layer in layers], context)
        rows.append({"name": f"{window} + {sinks} sinks", "planned": planned, **peak_bytes(model, tokens, 16)})
    return rows


def show(judge: Judge, memory: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    names = list(judge.texts)
    head = ["", *(f"KL {name} (× ppl)" for name in names)]
    head += [f"{text.kind} {text.distance}" for text in judge.recalled]
    lines = [head]
    for row in judge.rows:
        cells = [f"{row[name]['kl']:.4f} ({row[name]['ratio']:.3f})" for name in names]
        lines.append([row["name"], *cells, *(f"{Recall(**each).top1:.1%}" for each in row["recall"])])
    print_columns(lines)
    for row in memory:
        echo(
            f"{row['name']}: planned {row['planned'] / 1e6:.2f} MB, held {row['cache'] / 1e6:.2f} MB "
            f"({row['cache'] / row['planned']:.3f}), at most {row['peak'] / 1e6:.2f} MB while decoding"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="rehead.benchmarks.windows", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, help="to measure on; repeat")
    parser.add_argument("--calibration", action="append", default=[], help="to choose and fit on; repeat")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens read at once")
    parser.add_argument("--tokens", type=int, default=32768, help="of each text")
    parser.add_argument("--share", default="auto:67%", help="layers of the checkpoint that get windows: as --layers")
    parser.add_argument("--keep", default="logit", choices=("logit", "sinks"), help="what they keep of the beginning")
    parser.add_argument("--trials", type=int, default=8, help="texts to recall from at each distance")
    parser.add_argument("--fit", type=int, default=250)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--distances", default="128,512,1024")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", default="plain,sinks,rules,saved,memory", help="of the table")
    parser.add_argument("--out", help="folder of the checkpoint that is made")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype = torch.float32, name: str = options.model) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(options.device).eval()

    original, parts = load(), options.part.split(",")
    tokenizer = load_tokenizer(open_named(options.model))
    texts = {Path(t).stem: token_stream([t], tokenizer, options.tokens) for t in options.text}
    first = next(iter(texts.values()))
    distances = fitting(map(int, options.distances.split(",")), original)
    recalled = recall_texts(first, distances, words=word_tokens(first, tokenizer), trials=options.trials)
    judge = Judge(original, texts, recalled, options.length)
    seen = token_stream(options.calibration or options.text, tokenizer, 4 * options.length).view(-1, options.length)
    judge.add("the original", original)
    if "plain" in parts:
        live_rows(judge, load, options.window, 0, seen)
    if "sinks" in parts:
        live_rows(judge, load, options.window, options.sinks, seen)
    count = math.floor(original.config.num_hidden_layers * 2 / 3)
    if "rules" in parts:
        rule_rows(judge, load, options.window, count, seen)
    if "saved" in parts:
        from rehead.convert import convert

        with tempfile.TemporaryDirectory() as place:
            out = Path(options.out or place) / "windows"
            started = time.monotonic()
            kept: dict[str, Any] = {"sink_logit": True} if options.keep == "logit" else {"sinks": options.sinks}
            done = convert(
                options.model, out, window=options.window, layers=options.share, refit=True, fit=options.fit, **kept,
                calibration=tuple(options.calibration), device=options.device, overwrite=True,
                calibration_tokens=options.calibration_tokens, calibration_length=options.length,
            )  # fmt: skip
            layers, seconds = done.plan.options.layers, time.monotonic() - started
            saved = load(name=str(out))
            chosen = len(parse_layers(layers, original.config.num_hidden_layers))
            judge.add(
                f"saved as {saved.config.model_type}, {chosen} layers, refitted, fitted by {options.fit} steps",
                saved, layers=layers, seconds=round(seconds, 1),
            )  # fmt: skip
    memory = memory_rows(load, 1024, options.sinks, CONTEXT) if "memory" in parts else []
    echo(json.dumps(machine()))
    show(judge, memory)


if __name__ == "__main__":
    main()
