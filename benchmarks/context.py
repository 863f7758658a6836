"""What each way of reading longer texts costs, beside the model as it is: one table of all of them.

::

    python -m rehead.benchmarks.context MODEL --context 32Ki --lengths 4Ki,16Ki --text speeches.txt --json figures.json
    python -m rehead.benchmarks.context MODEL --methods plain,yarn,dual_chunk --also uptrained=FOLDER --text docs.rst

Of every method: perplexity of running text by position and copying at a distance, both from the same passes over texts
that begin with a block of words and end with it (:mod:`rehead.models.recall`); key-value recall at that distance; a
needle at a depth of 0; and the divergence from the model as it is on short texts. A length is that of the whole text.
``--also`` adds a line for a checkpoint, such as one converted and uptrained, that reads the very same texts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.benchmarks.command import run_script
from rehead.benchmarks.machine import headline, machine
from rehead.console import echo, print_columns
from rehead.counts import parse_count
from rehead.data.beginning import text_start
from rehead.data.tokens import token_stream
from rehead.errors import UsageError, unknown_name
from rehead.models.distance import Distances, distances, token_nll
from rehead.models.live import evaluating, resolve_device
from rehead.models.predictions import Predictions, predict
from rehead.models.recall import LEAD, RecallText, recall, recall_texts
from rehead.patches import patch_model
from rehead.recipes.evaluation.models import JudgedModel, load_model, open_named, require_same_tokenizer
from rehead.recipes.evaluation.needle import count_hits, prompt, word_tokens
from rehead.variants.context.options import ContextOptions

PLAIN = "plain"
METHODS = (PLAIN, "linear", "ntk", "dynamic", "yarn", "longrope", "fitted", "dual_chunk", "self_extend")
"""The model as it is, RoPE stretched in seven ways but drope's, which needs training, and the two patches."""
MEASURES = ("copy", "pairs", "needle", "short")


class Texts:
    """What every method reads: the same texts for each.

    Args:
        tokens: int64 ``[T]``, running text.
        tokenizer: the model's, or None.
        options: the command line's.
    """

    def __init__(self, tokens: Tensor, tokenizer: Any, options: argparse.Namespace) -> None:
        words, start = word_tokens(tokens, tokenizer, "--text"), text_start(tokenizer)
        self.recalled: dict[tuple[str, int], RecallText] = {}
        self.needles: dict[int, Tensor] = {}
        for length in options.lengths:
            distance = length - len(start) - LEAD - options.block
            kinds: Any = [kind for kind in ("copy", "pairs") if kind in options.measures]
            for text in recall_texts(
                tokens, [distance], kinds=kinds, words=words, trials=options.trials, start=start, block=options.block
            ):
                self.recalled[text.kind, length] = text
            if "needle" in options.measures:
                rows = [prompt(tokens, words, tokenizer, length, 0.0, (0, length, i)) for i in range(options.trials)]
                self.needles[length] = torch.stack(rows)
        count = max(1, min(len(tokens), options.short_tokens) // options.short)
        self.short = tokens[: count * options.short].view(count, -1) if "short" in options.measures else tokens[:0]


def by_position(losses: Tensor, shortest: int = 256) -> dict[str, float]:
    """Perplexity by position in the text, in spans that double: ``{"0-256": ..., "256-512": ...}``.

    Args:
        losses: ``[N, S]``, nats of the token after each position; NaN where it is not counted.
    """
    spans, low = {}, 0
    while low < losses.shape[1]:
        high = max(shortest, 2 * low)
        part = losses[:, low:high]
        if part.isfinite().any():
            spans[f"{low}-{high}"] = math.exp(min(709.0, float(part[part.isfinite()].mean())))
        low = high
    return spans


def copying(model: Any, text: RecallText) -> dict[str, Any]:
    """Perplexity by position of the text between the blocks, and what is copied of the first in the second."""
    parts = [predict(model, {"input_ids": rows[None, :-1].to(model.device)}) for rows in text.tokens]
    predictions, targets = Predictions.cat(parts), text.tokens[:, 1:]
    losses = token_nll(predictions, targets.flatten()).view(targets.shape).clone()
    size, recalled = len(text.recalled), text.recalled.expand(len(targets), -1)
    last = predictions[torch.arange(targets.numel()).view(targets.shape)[:, -size:][recalled]]
    right = last.argmax().cpu() == targets[:, -size:][recalled]
    nll = losses[:, -size:][recalled]
    losses[:, -size:] = math.nan
    first = targets.shape[1] - size - text.distance  # where the first block's tokens are the targets
    losses[:, max(0, first) : first + size] = math.nan
    row = {"top1": float(right.double().mean()), "nll": float(nll.mean()), "tokens": right.numel()}
    return {"perplexity": by_position(losses), "copy": row | {"distance": text.distance, "texts": len(targets)}}


def measure(model: Any, texts: Texts, reference: list[Predictions] | None) -> dict[str, Any]:
    """One method's figures.

    Args:
        model: live, with the method on it.
        texts: what it reads.
        reference: the plain model's predictions of the short texts, if it has any; None for the plain model's own row.
    """
    found: dict[str, Any] = {"lengths": {}}
    with evaluating(model):
        if len(texts.short) and reference is not None:
            rows = [predict(model, {"input_ids": row[None].to(model.device)}) for row in texts.short]
            apart = Distances.cat([distances(*pair) for pair in zip(reference, rows)])
            found["short"] = {"kl": apart.mean_kl, "largest": apart.largest, "tokens": texts.short.numel()}
        for (kind, length), text in texts.recalled.items():
            row, started = found["lengths"].setdefault(str(length), {}), time.perf_counter()
            if kind == "copy":
                row |= copying(model, text)
            else:
                row["pairs"] = recall(model, [text])[0].to_dict()
            row[f"{kind}_seconds"] = round(time.perf_counter() - started, 1)
        for length, prompts in texts.needles.items():
            hits = count_hits(model, prompts)
            found["lengths"].setdefault(str(length), {})["needle"] = {"hits": hits, "trials": len(prompts)}
    return found


def patch_options(method: str, options: argparse.Namespace, loaded: JudgedModel) -> tuple[str, dict[str, Any]]:
    """The patch of a method and what it is told; factors are fitted here where the method asks for it.

    Raises:
        UsageError: an unknown method.
    """
    if method == "self_extend":
        trained = options.trained or loaded.model.config.max_position_embeddings
        near = max(1, trained // 8)  # as the variant's own default has it
        return method, _told(options) | {"group": max(8, -(-(max(options.lengths) - near) // (trained - near)))}
    if method == "dual_chunk":
        return method, _told(options)
    if method not in METHODS[1:]:
        raise UsageError(unknown_name("method", method, METHODS))
    told: dict[str, Any] = _told(options) | {"tokens": options.context, "rope": method}
    if method == "fitted":
        from rehead.data.calibration import calibration_tokens
        from rehead.variants.context.fit import fit_factors

        rows = calibration_tokens(loaded.tokenizer, 16 * options.fit_length, options.fit_length)
        fitted = fit_factors(loaded.model, rows, ContextOptions.parse(told))
        told["factors"] = fitted.factors
    return "context", told


def _told(options: argparse.Namespace) -> dict[str, Any]:
    return {"trained": options.trained} if options.trained else {}


@contextmanager
def under(loaded: JudgedModel, method: str, options: argparse.Namespace) -> Iterator[None]:
    """Inside the block the model reads by a method, on Rehead's tiled attention."""
    with ExitStack() as stack:
        if method != PLAIN:
            name, told = patch_options(method, options, loaded)
            stack.enter_context(patch_model(loaded.model, name, **told))
        if method not in ("dual_chunk", "self_extend"):
            stack.enter_context(patch_model(loaded.model, "tiled"))
        yield


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table: a line for each method."""
    lengths = [length for length in rows[0]["lengths"]]
    spans = list(rows[0]["lengths"][lengths[-1]].get("perplexity", {})) if lengths else []
    table = [["", "short KL", *(f"ppl {span}" for span in spans)]]
    asked = [(length, kind) for length in lengths for kind in rows[0]["lengths"][length] if kind in MEASURES]
    table[0] += [f"{kind} {length}" for length, kind in asked]
    for row in rows:
        cells = [f"{row['short']['kl']:.2g}" if "short" in row else ""]
        cells += [f"{row['lengths'][lengths[-1]]['perplexity'][span]:.2f}" for span in spans]
        for length, kind in asked:
            found = row["lengths"][length][kind]
            cells.append(f"{found['hits']}/{found['trials']}" if kind == "needle" else f"{found['top1']:.1%}")
        table.append([row["name"], *cells])
    print_columns(table)


def _counts(text: str) -> list[int]:
    return [parse_count(part) if not part.isdigit() else int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m rehead.benchmarks.context", description=summary)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, help="to measure on; repeat")
    parser.add_argument("--lengths", type=_counts, default=[2048, 16384], help="tokens of a whole text, e.g. 4Ki,16Ki")
    parser.add_argument("--context", type=parse_count, default=32768, help="what stretched methods are made for")
    parser.add_argument("--trained", type=parse_count, help="tokens the model was trained to read, if not its config's")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--measures", default=",".join(MEASURES), help="with commas between; copy has perplexity too")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=FOLDER", help="a checkpoint, also measured; repeat"
    )
    parser.add_argument("--trials", type=int, default=4, help="texts of each length")
    parser.add_argument("--block", type=int, default=64, help="words that are copied")
    parser.add_argument("--short", type=int, default=512, help="tokens of a short text")
    parser.add_argument("--short-tokens", type=parse_count, default=4096, help="of all short texts together")
    parser.add_argument("--fit-length", type=parse_count, default=512, help="tokens of the rows that fitted reads")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--json", help="also write the rows to this file, after each method")
    return parser


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """The command line, its names checked before a model is loaded."""
    options.methods, options.measures = options.methods.split(","), options.measures.split(",")
    for names, known, word in ((options.methods, METHODS, "method"), (options.measures, MEASURES, "measure")):
        for name in names:
            if name not in known:
                raise UsageError(unknown_name(word, name, known))
    for name in ("trials", "block", "short", "short_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    if min(options.lengths) < 2 * options.block + LEAD + 6:
        raise UsageError(f"--lengths {min(options.lengths)}: too short for two blocks of {options.block}; give more")
    taken = set(METHODS)
    for text in options.also:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise UsageError("--also: give NAME=FOLDER")
        if name in taken:
            raise UsageError(f"--also {name}: another row has this name; give it one of its own")
        taken.add(name)
        open_named(folder)  # missing ones are told now and not after every method has been measured
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _checked(_parser().parse_args(arguments))
    device = resolve_device(options.device)
    loaded = load_model("model", options.model, device=device, dtype=options.dtype)
    tokens = token_stream(
        options.text, loaded.tokenizer, max(2 * max(options.lengths), options.short_tokens), option="--text"
    )
    texts, rows = Texts(tokens, loaded.tokenizer, options), list[dict[str, Any]]()
    with evaluating(loaded.model), patch_model(loaded.model, "tiled"):
        reference = [predict(loaded.model, {"input_ids": row[None].to(device)}) for row in texts.short]

    def add(name: str, model: Any, **facts: Any) -> None:
        rows.append({"name": name, **facts, **measure(model, texts, None if name == PLAIN else reference)})
        if options.json:
            asked = {key: value for key, value in vars(options).items() if key != "json"}
            Path(options.json).write_text(
                json.dumps({"machine": machine(device), "asked": asked, "rows": rows}, indent=1)
            )

    for method in options.methods:
        with under(loaded, method, options):
            add(method, loaded.model)
    for text in options.also:
        name, _, folder = text.partition("=")
        other = load_model("model", folder, device=device, dtype=options.dtype, attention="tiled")
        require_same_tokenizer(loaded, other)
        add(name, other.model)
    echo(headline(machine(device)))
    show(rows)


if __name__ == "__main__":
    run_script(main)
