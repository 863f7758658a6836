"""Decoding with a LLaMA-2-7B-shaped model of random weights and 32, 8 or 1 KV heads: tokens per second, patched or not.

Greedy decoding under a StaticCache whose first tokens are already there (random keys and values, as the weights are),
so that no time goes into a prefill. With ``--backend graph`` (the default) one step, mask and argmax included, is
captured as a CUDA graph and replayed; with ``compiled`` its forward pass goes through ``torch.compile`` first. The
others run `generate` itself; there the rate is the slope between a short and a long run, and what `generate` does
between steps counts. A decoding step has to read the weights and the cache once, so the speed-up over 32 KV heads can
at best be the ratio of those bytes; the last column is the share of it that is reached.

``tiled+fused`` also folds the norms and makes q, k, v and the FFN's input one product each (the variant
``fuse``): the same function.

    rehead bench end-to-end
    python -m rehead.benchmarks.end_to_end --kv-heads 32,8,1 --batch 16 --context 8192
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from rehead.benchmarks.graphs import warm_up
from rehead.benchmarks.machine import headline, machine
from rehead.errors import UnsupportedError, UsageError
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.patches import patch_model

IMPLEMENTATIONS = ("tiled", "tiled+fused", "sdpa")
DEFAULT = ("tiled", "sdpa")
STEPPED = ("graph", "compiled")
"""Backends that replay one step; the others run `generate`."""


@dataclass(frozen=True)
class Setting:
    """Shape of the model and of the run; the defaults are LLaMA-2-7B, batch 16, 8k context, bfloat16."""

    batch: int = 16
    context: int = 8192
    steps: int = 96
    hidden_size: int = 4096
    intermediate_size: int = 11008
    layers: int = 32
    heads: int = 32
    vocab_size: int = 32000
    backend: str = "graph"
    padding: int = 0


@dataclass
class Row:
    """One measurement.

    Attributes:
        implementation: one of :data:`IMPLEMENTATIONS`.
        kv_heads: KV heads of every layer.
        tokens_per_second: over the batch, decoding only.
        milliseconds: of one step.
        bytes_read: weights and the cache in use, that a step must read.
        bandwidth: those bytes per second, in TB/s.
        speedup: over 32 (the most) KV heads under the same implementation.
        predicted: the ratio of the bytes.
        share: of the predicted speed-up that is reached.
    """

    implementation: str
    kv_heads: int
    tokens_per_second: float
    milliseconds: float
    bytes_read: int
    bandwidth: float
    speedup: float = 1.0
    predicted: float = 1.0
    share: float = 1.0


def build(setting: Setting, kv_heads: int, device: str) -> LlamaForCausalLM:
    """The model on its device, in bfloat16 on a GPU and float32 on a CPU, with SDPA."""
    config = LlamaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=setting.context + setting.steps + 64,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def check_room(setting: Setting, kv_heads: int, device: str) -> None:
    """Refuse, before anything is allocated, what cannot fit in the memory of the machine or of the GPU.

    Raises:
        UnsupportedError: weights and cache are larger than it.
    """
    if device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    model = build(setting, kv_heads, "meta")
    head_dim = setting.hidden_size // setting.heads
    cached = 2 * setting.layers * kv_heads * head_dim * setting.batch * (setting.context + setting.steps)
    needed = (sum(p.numel() for p in model.parameters()) + cached) * (2 if device == "cuda" else 4)
    if needed > room:
        place = "GPU" if device == "cuda" else "machine"
        raise UnsupportedError(
            f"weights and cache with {kv_heads} KV heads take {needed / 1e9:.0f} GB and the {place} has "
            f"{room / 1e9:.0f} GB; give smaller --batch, --context or --layers"
        )


def filled_cache(model: Any, setting: Setting) -> StaticCache:
    """A static cache that holds ``context - 1`` random tokens."""
    config = model.config
    cache: Any = StaticCache(config=config, max_cache_len=setting.context + setting.steps)
    head_dim = config.hidden_size // config.num_attention_heads
    parameter = next(model.parameters())
    cache.early_initialization(setting.batch, config.num_key_value_heads, head_dim, parameter.dtype, parameter.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def rewind(cache: Any, seen: int) -> None:
    """Say that the first ``seen`` tokens are in the cache, without touching them."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(seen)


def _generate(model: Any, cache: Any, setting: Setting, steps: int, seed: int) -> float:
    device = next(model.parameters()).device
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, setting.vocab_size, (setting.batch, setting.context), generator=gen).to(device)
    mask = torch.ones_like(ids)
    mask[: setting.batch // 2, : setting.padding] = 0
    rewind(cache, setting.context - 1)
    compiled = setting.backend != "none"
    options = GenerationConfig(
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=not compiled,
        compile_config=CompileConfig(backend=setting.backend, mode=_mode(setting)) if compiled else None,
    )
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, generation_config=options, **cache_argument(cache))
    _wait(device)
    seconds = time.perf_counter() - start
    if out.shape[1] != setting.context + steps:
        raise UnsupportedError(f"generate stopped after {out.shape[1] - setting.context} tokens of {steps}")
    return seconds


def _replayed(model: Any, cache: Any, setting: Setting) -> float:
    """Seconds of one greedy step, captured once and replayed (called again and again where there are no graphs)."""
    device = next(model.parameters()).device
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(10, setting.vocab_size, (setting.batch, 1), generator=gen).to(device)
    positions = torch.empty_like(ids)
    # Keys past the current position are hidden by causality, so the mask need not grow.
    mask = torch.ones(setting.batch, setting.context + setting.steps, dtype=torch.long, device=device)
    mask[: setting.batch // 2, : setting.padding] = 0
    forward = torch.compile(model.forward, dynamic=False) if setting.backend == "compiled" else model

    def step() -> None:
        with torch.no_grad():
            logits = forward(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache_argument(cache)
            ).logits
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        positions.add_(1)

    def restart() -> None:
        rewind(cache, setting.context - 1)
        positions.fill_(setting.context - 1)

    restart()
    replay = step
    if device.type == "cuda":
        warm_up(step)
        restart()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    runs = []
    for _ in range(3):
        restart()
        _wait(device)
        start = time.perf_counter()
        for _ in range(setting.steps):
            replay()
        _wait(device)
        runs.append((time.perf_counter() - start) / setting.steps)
    return statistics.median(runs)


def _slope(model: Any, cache: Any, setting: Setting) -> float:
    """Seconds of one step of `generate`."""
    _generate(model, cache, setting, 4, 0)  # compiles and captures
    _generate(model, cache, setting, 8, 0)
    short, long = max(4, setting.steps // 8), setting.steps
    spans = [_generate(model, cache, setting, n, n) for n in (short, long, short, long)]
    return (min(spans[1], spans[3]) - min(spans[0], spans[2])) / (long - short)


def _mode(setting: Setting) -> Any:
    return "reduce-overhead" if setting.backend == "inductor" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bytes_read(model: nn.Module, setting: Setting, kv_heads: int) -> int:
    """What one decoding step must read: every weight but the input embedding, and the keys and values in use."""
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    size = next(model.parameters()).element_size()
    used = setting.context + setting.steps // 2
    head_dim = setting.hidden_size // setting.heads
    return weights + setting.batch * used * setting.layers * 2 * kv_heads * head_dim * size


@contextlib.contextmanager
def applied(model: Any, name: str) -> Iterator[None]:
    """The model, which has SDPA, under one of :data:`IMPLEMENTATIONS`."""
    with contextlib.ExitStack() as patches:
        if name != "sdpa":
            patches.enter_context(patch_model(model, "tiled"))
        if name == "tiled+fused":
            patches.enter_context(patch_model(model, "fuse"))
        yield


def measure(setting: Setting, kv_heads: int, implementations: Sequence[str], device: str) -> list[Row]:
    """Decode with one model under each implementation."""
    model = build(setting, kv_heads, device)
    cache = filled_cache(model, setting)
    rows = []
    for name in implementations:
        with applied(model, name):
            step = (_replayed if setting.backend in STEPPED else _slope)(model, cache, setting)
        # A compiled forward belongs to the implementation it was traced with.
        torch._dynamo.reset()
        model.__dict__.pop("_compiled_call", None)
        model.__dict__.pop("_last_compile_config", None)
        read = bytes_read(model, setting, kv_heads)
        rows.append(Row(name, kv_heads, setting.batch / step, 1e3 * step, read, read / step / 1e12))
        print(f"... {rows[-1]}", file=sys.stderr, flush=True)
    del model, cache
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows


def run(setting: Setting, kv_heads: Sequence[int] = (32, 8, 1), implementations: Sequence[str] = DEFAULT) -> list[Row]:
    """Measure every pairing; speed-ups are over the most KV heads.

    Raises:
        UsageError: an implementation that does not exist.
        UnsupportedError: KV heads that do not divide the query heads, or more bytes than there is memory.
    """
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise UsageError(f"unknown implementation {name!r}; choose from {', '.join(IMPLEMENTATIONS)}")
    for count in kv_heads:
        if count < 1 or setting.heads % count:
            raise UnsupportedError(f"{setting.heads} query heads cannot share {count} KV heads; choose a divisor")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ordered = sorted(kv_heads, reverse=True)
    check_room(setting, ordered[0], device)
    rows = [row for count in ordered for row in measure(setting, count, implementations, device)]
    for row in rows:
        base = next(r for r in rows if r.implementation == row.implementation and r.kv_heads == ordered[0])
        row.speedup = base.milliseconds / row.milliseconds
        row.predicted = base.bytes_read / row.bytes_read
        row.share = row.speedup / row.predicted
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = ["attention  KV heads  tokens/s  ms/step  TB/s  speed-up  by bytes  share"]
    lines += [
        f"{r.implementation:<9}  {r.kv_heads:>8}  {r.tokens_per_second:>8.0f}  {r.milliseconds:>7.2f}  "
        f"{r.bandwidth:>4.2f}  {r.speedup:>8.2f}  {r.predicted:>8.2f}  {r.share:>5.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def counts(text: str) -> list[int]:
    """Numbers with commas between."""
    return [int(count) for count in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; ``argv`` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="rehead bench end-to-end", description="Decoding with a 7B-shaped model under a static cache"
    )
    defaults = Setting()
    parser.add_argument("--kv-heads", type=counts, default="32,8,1", help="numbers with commas between")
    parser.add_argument("--implementations", default=",".join(DEFAULT), help=f"of {', '.join(IMPLEMENTATIONS)}")
    for name in ("batch", "context", "steps", "layers", "heads", "hidden_size", "intermediate_size", "vocab_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--padding", type=int, default=0, help="left padding of half the batch, in tokens")
    parser.add_argument(
        "--backend",
        choices=(*STEPPED, "inductor", "cudagraphs", "none"),
        default=defaults.backend,
        help="graph replays one captured step, compiled the same after torch.compile; the others are what generate "
        "compiles its step with, none not at all",
    )
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    names = Setting.__dataclass_fields__
    setting = Setting(**{name: getattr(args, name) for name in names})
    rows = run(setting, args.kv_heads, args.implementations.split(","))
    facts = machine()
    print(headline(facts))
    print(f"batch {setting.batch}, context {setting.context}, backend {setting.backend}")
    print(table(rows))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": facts, "setting": asdict(setting), "rows": [asdict(r) for r in rows]}, indent=2)
        )


if __name__ == "__main__":
    main()
