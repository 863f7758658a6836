"""Shared by proofs and measurements: tokens to run a model on, ways to run it, and comparison of the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rehead.errors import UsageError, first_line
from rehead.models.distance import difference, largest
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.predictions import Predictions, predict, predict_step

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; the random state is restored after it."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def config_value(config: Any, name: str) -> Any:
    """A config's value, or None where it has none or one per layer (then some configs raise an error)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def probe_tokens(model: nn.Module, length: int, batch: int, seed: int) -> Tensor:
    """Random token ids ``[batch, length]`` on the model's device, away from the lowest ids (padding, end of text)."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    if vocabulary < 4:
        raise UsageError("the model's config has no vocab_size to draw probe tokens from; pass input_ids= to prove()")
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(min(8, vocabulary // 2), vocabulary, (batch, length), generator=gen).to(_device(model))


def checked_tokens(input_ids: Any, model: nn.Module | None = None) -> Tensor:
    """A caller's token ids, checked and moved to the model's device.

    Args:
        input_ids: int ``[B, S]``.
        model: the model that will read them.

    Raises:
        UsageError: not an integer tensor of two dimensions, empty, or with ids outside the model's vocabulary.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise UsageError("input_ids must be an integer tensor [batch, length]; tokenise with return_tensors='pt'")
    if not input_ids.numel():
        raise UsageError("input_ids holds no tokens; tokenise some text first")
    if model is None:
        return input_ids
    table = _table_size(model)
    if table is not None and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < table:
        worst = int(input_ids.min()) if int(input_ids.min()) < 0 else int(input_ids.max())
        raise UsageError(f"input_ids holds token {worst}, the model has {table}; use the model's own tokenizer")
    return input_ids.to(_device(model))


def batches(input_ids: Tensor, model: nn.Module | None = None, rows: int = 2) -> list[Tensor]:
    """Token ids ``[B, S]``, checked as by :func:`checked_tokens`, in batches of at most ``rows`` sequences."""
    return list(checked_tokens(input_ids, model).split(rows))


def _table_size(model: nn.Module) -> int | None:
    """Number of rows of a model's token embedding; None where it cannot be read."""
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _device(model: nn.Module) -> torch.device:
    """The device for a model's inputs. For a model that is offloaded as a whole, accelerate moves them itself."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's weights."""
    counts: dict[torch.dtype, int] = {}
    for p in model.parameters():
        counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def default_length(model: nn.Module) -> int:
    """A length for probe texts: past a short window or chunk, still quick, and within the model's positions."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    # On a GPU several tiles of the kernels (up to 192 rows, 128 keys), the last of them ragged.
    length = 300 if any(p.is_cuda for p in model.parameters()) else 48
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        extent = config_value(config, name)
        if isinstance(extent, int) and 1 < extent <= 1024:
            length = max(length, 2 * extent + 3)
    limits = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min([length, *(limit for limit in limits if isinstance(limit, int) and limit > 1)])


def called(model: nn.Module, names: list[str], run: Any) -> tuple[Any, set[str]]:
    """(the result of ``run()``, which of the named modules it called)."""
    seen: set[str] = set()
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(lambda module, args, name=name: seen.add(name)) for name in names]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Probe:
    plain: dict[str, Any]
    changed: dict[str, Any]
    padded: dict[str, Any] | None
    cut: int


def make_probe(model: nn.Module, input_ids: Tensor | None, length: int | None, padding: bool) -> Probe:
    """Probe inputs: plain tokens, the same with a changed second half, and the same with the first row left-padded."""
    if input_ids is None:
        input_ids = probe_tokens(model, length or default_length(model), 2, seed=0)
    else:
        input_ids = checked_tokens(input_ids, model)
    length = input_ids.shape[1]
    if length < 2:
        raise UsageError("a proof needs at least two tokens; pass longer input_ids")
    cut = max(1, length // 2)
    changed = input_ids.clone()
    # Permuting the later tokens changes them without inventing ids that the model may not have.
    changed[:, cut:] = input_ids[:, cut:].roll(1, dims=1).flip(0)
    if torch.equal(changed, input_ids):
        changed[:, cut:] = input_ids[:, :1]
    mask = torch.ones_like(input_ids)
    mask[0, : max(1, length // 5)] = 0
    return Probe(
        {"input_ids": input_ids},
        {"input_ids": changed},
        {"input_ids": input_ids, "attention_mask": mask} if padding else None,
        cut,
    )


@dataclass
class Outputs:
    plain: Predictions
    changed: Predictions
    padded: Predictions | None
    cached: Predictions | None = None


def continued(model: nn.Module, probe: Probe) -> Predictions | None:
    """Predictions ``[rows]`` of a prefill, one token and the rest through a cache; None without a cache."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    tokens = probe.plain["input_ids"]
    mask = torch.ones_like(tokens) if probe.padded is None else probe.padded["attention_mask"]
    cache, rows = None, []
    for start, stop in ((0, probe.cut), (probe.cut, probe.cut + 1), (probe.cut + 1, tokens.shape[1])):
        if start == stop:
            continue
        step = cache_argument(cache) | {
            "input_ids": tokens[:, start:stop],
            "attention_mask": mask[:, :stop],
            "use_cache": True,
        }
        part, out = predict_step(model, step, rows=tokens.numel())
        cache = returned_cache(out)
        if cache is None or getattr(out, "logits", None) is None:
            return None
        rows.append(part[mask[:, start:stop].bool()])
    return Predictions.cat(rows)


def continued_if_it_can(model: nn.Module, probe: Probe) -> tuple[Predictions | None, str]:
    """:func:`continued` for an unpatched model, which may fail: then there is nothing to compare a patch with.

    Returns:
        (predictions, ""), or (None, the error's text), or (None, "") for a model without a cache.
    """
    try:
        return continued(model, probe), ""
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(error)}"


def run_probe(model: nn.Module, probe: Probe, plain: Predictions | None = None) -> Outputs:
    """Predictions for every part of the probe; pass ``plain`` to reuse those of its plain tokens."""
    return Outputs(
        predict(model, probe.plain) if plain is None else plain,
        predict(model, probe.changed),
        None if probe.padded is None else predict(model, probe.padded),
    )


def gap_of(a: Outputs, b: Outputs, probe: Probe) -> float:
    """Largest difference of two models' logits, padding left out."""
    gap = max(difference(a.plain, b.plain), cached_gap(a, b) or 0.0)
    if a.padded is not None and b.padded is not None and probe.padded is not None:
        keep = probe.padded["attention_mask"].bool()
        gap = max(gap, difference(a.padded[keep], b.padded[keep]))
    return gap


def cached_gap(a: Outputs, b: Outputs) -> float | None:
    return None if a.cached is None or b.cached is None else difference(a.cached, b.cached)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Run an unpatched model with eager attention inside the block."""
    configs = {id(c): c for m in model.modules() for c in m.__dict__.values() if isinstance(c, PreTrainedConfig)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def allowed(predictions: Predictions | Tensor, share: float) -> float:
    """The largest allowed difference: a share of the largest finite logit, or of 1 if that is larger."""
    return share * max(1.0, largest(predictions))
