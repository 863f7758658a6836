"""Verifying a converted checkpoint: its files, that plain transformers loads it, and how far it is from its source."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.manifest import verify_files
from rehead.checkpoints.opening import open_source
from rehead.checkpoints.source import Source
from rehead.console import Progress
from rehead.data.sample import Sample, sample
from rehead.errors import UnsupportedError, VerificationError
from rehead.models.cache_layouts import config_layouts
from rehead.models.config import resolve_config
from rehead.models.distance import distances
from rehead.models.families.spec import steady_length
from rehead.models.layout import cache_bytes
from rehead.models.live import decoder_layers
from rehead.models.meta import draft_layers, load_report
from rehead.models.modeling import carried_modules, needed_modules
from rehead.models.modeling.modeling_rehead_cache import cache_argument, returned_cache
from rehead.models.remote import open_known
from rehead.models.serving import engines
from rehead.models.streamed import in_memory, stream

_CACHE_TOLERANCE = 2e-3
_EXACT_TOLERANCE = 1e-5
#: Where weights that stand for the same function had to be rounded to 16 bits.
_ROUNDED_TOLERANCE = 5e-2
#: Tokens decoded one by one where each reads the model from disk.
_STREAMED_STEPS = 2


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        files: files whose size and SHA-256 were checked.
        cache_error: largest difference between logits computed with and without a KV cache, relative to the logits'
            size; None where the class hands no cache back (RecurrentGemma keeps its own).
        against_source: mean KL divergence in nats to the source, share of equal top tokens and largest logit
            difference, over ``positions`` next-token predictions; None without a source.
        engines: which serving engines read a model of this kind right, wrong or not at all, as far as any was run.
        text: what all of this was measured on: a built-in text, or random tokens where there is no tokenizer.
        plain: transformers' own class loads it; otherwise it carries a modelling file of ours.
        missing: tensors that the class has and neither this checkpoint nor its source (a base model's head): each load
            draws them again.
        unexpected: tensors that both hold and the class ignores.
        drafts: layers that the class does not load and no conversion changes: they keep the source's heads.
        cache_bytes: of the cache that decoding left: its ``tokens``, the bytes ``measured`` in float32 and those that
            the ``layout`` of the layers says; None where the class hands no cache back or the config says too little.
            Some classes repeat their KV heads before they cache them (Falcon), which an engine need not.
        source_cache_error: the source's own ``cache_error``, where this one is beyond what rounding explains: the class
            computes something else with a cache (MiniMax does), converted or not.
    """

    files: int
    cache_error: float | None
    against_source: dict[str, float] | None
    plain: bool = True
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    source_cache_error: float | None = None
    cache_bytes: dict[str, int] | None = None
    text: str = ""
    engines: dict[str, list[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "loads": True,
            "loads_with": "with plain transformers" if self.plain else "with the modelling file that it carries",
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "drafts": list(self.drafts),
            "cache_error": self.cache_error,
            "cache_bytes": self.cache_bytes,
            "source_cache_error": self.source_cache_error,
            "against_source": self.against_source,
            "text": self.text,
            "engines": self.engines,
        }


def verify(
    out: str | os.PathLike[str],
    source: str | None = None,
    *,
    revision: str | None = None,
    positions: int = 256,
    progress: Progress | None = None,
) -> Verification:
    """Check a converted folder.

    Its files are compared with the manifest's SHA-256, plain ``AutoModelForCausalLM`` must load it with no missing,
    unexpected or mismatched tensor, its logits must be finite, and generation with a cache must compute what a full
    pass computes. With a source, both models are run over the same text; where the manifest says that the conversion
    is exact, their logits must agree. Both are read from disk as they run, a weight at a time.

    Args:
        out: the folder.
        source: the original, to compare logits with: a folder or a Hub id.
        revision: Hub revision of ``source``.
        positions: tokens to compare.
        progress: called with ("hashing", bytes done, bytes), then with ("running", layers done, layers).

    Raises:
        UsageError: no such folder, or one that Rehead did not write.
        VerificationError: something did not hold; the line says what.
    """
    manifest = verify_files(out, None if progress is None else lambda done, total: progress("hashing", done, total))
    folder = open_source(str(out))
    config = resolve_config(folder.config, str(out))
    if absent := _absent_code(folder):
        raise VerificationError(f"{out}: its config.json names {min(absent)}, which is not there; make it again")
    shapes = {name: (info.dtype, info.shape) for name, info in folder.tensors.items()}
    report = load_report(config, shapes)
    if report and (source is None or report.beyond(_report_of(source, revision))):
        remedy = "give --source MODEL if its source lacks them too" if source is None else "convert it again"
        raise VerificationError(f"{out}: does not load cleanly: {report.line()}; {remedy}")
    measured = _sample(folder, config, positions)
    tokens = measured.tokens
    count = _Count(progress)
    model = _open(folder, config)
    count.expect(model, 1 + 1 + _STREAMED_STEPS + (source is not None))
    logits = _logits(model, tokens)
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError(f"{out}: its logits are not finite; check the source or convert it again")
    cache_error, size = _cached(model, tokens, logits)
    differs = f"{out}: logits with a KV cache differ from those without by {cache_error or 0:.1e}"
    suspect = cache_error is not None and not cache_error <= _CACHE_TOLERANCE  # a NaN is over it too
    if suspect and source is None:
        raise VerificationError(f"{differs}; give --source MODEL to tell whether its class does so unconverted")
    del model
    against, theirs = None, None
    if source is not None:
        against, theirs = _compare(logits, open_known(source, revision), tokens, suspect, count)
        if suspect and (theirs is None or theirs <= _CACHE_TOLERANCE):
            raise VerificationError(f"{differs}, its source's by {theirs or 0:.1e}; report this model")
        tolerance = _ROUNDED_TOLERANCE if manifest.get("rounded") else _EXACT_TOLERANCE
        if manifest.get("exact") and not against["max_difference"] <= tolerance * float(logits.abs().max()):
            raise VerificationError(
                f"{out}: the conversion is exact by its manifest, but logits differ from {source}'s by "
                f"{against['max_difference']:.1e}; check that this is the source it came from"
            )
    plain, files = not folder.config.get("auto_map"), len(manifest["files"])
    missing, unexpected = tuple(sorted(report.missing)), tuple(sorted(report.unexpected))
    folder.ignore(report.ignored)
    drafts = tuple(draft_layers(folder))
    told = (measured.name, engines(folder.config))
    return Verification(files, cache_error, against, plain, missing, unexpected, drafts, theirs, size, *told)


class _Count:
    """Tells how many layers have run, of the passes over a model that are to come."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done, self._total = progress, 0, 0

    def expect(self, model: Any, passes: int) -> None:
        """Count the model's layers; so many passes over it, and others of its depth, are to come."""
        layers = decoder_layers(model)
        self._total += passes * len(layers)
        for layer in layers:
            layer.register_forward_hook(self._ran)

    def _ran(self, *_: Any) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("running", self._done, max(self._done, self._total))


def _absent_code(folder: Source) -> set[str]:
    """Modelling files that the config names, or that one of them imports, and that are not there."""
    present, absent = set(folder.list_files()), set()
    for module in carried_modules(folder.config):
        names = [f"{module}.py"]
        if names[0] in present:
            text = folder.small_path(names[0]).read_text(encoding="utf-8")
            names += [f"{needed}.py" for needed in needed_modules(text)]
        absent |= set(names) - present
    return absent


def _report_of(source: str, revision: str | None) -> Any:
    opened = open_known(source, revision)
    shapes = {name: (info.dtype, info.shape) for name, info in opened.tensors.items()}
    return load_report(resolve_config(opened.config, source), shapes)


def _sample(folder: Source, config: Any, count: int) -> Sample:
    """One row of text, as long as the model's positions allow, and as one set of rotary frequencies holds."""
    limit = steady_length(config) or count
    return sample(folder, config.vocab_size, 1, min(count, int(limit)))


def _open(source: Source, config: Any) -> Any:
    try:
        return stream(source, config)
    except UnsupportedError as error:
        raise VerificationError(f"{error}; convert it again") from None


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    return _run(model, tokens, tokens, use_cache=False).logits[0].float()


def _run(model: Any, tokens: Tensor, source: Tensor, **options: Any) -> Any:
    """A forward pass; an encoder-decoder's encoder reads ``source``."""
    if model.config.is_encoder_decoder:
        return model(input_ids=source, decoder_input_ids=tokens, **options)
    return model(input_ids=tokens, **options)


@torch.no_grad()
def _cached(model: Any, tokens: Tensor, logits: Tensor) -> tuple[float | None, dict[str, int] | None]:
    """Prefill half of the tokens, decode some more one by one: (distance from the full pass, size of the cache).

    The first is None without a cache, the second also where a layout does not say enough. Eight are decoded, or two
    where each has to read the model from disk.
    """
    steps = 8 if in_memory(model) else _STREAMED_STEPS
    half = tokens.shape[1] // 2
    # As generate() does: some classes count positions from 0 whatever is in the cache (Bamba).
    placed = not model.config.is_encoder_decoder and "position_ids" in inspect.signature(model.forward).parameters
    step = _run(model, tokens[:, :half], tokens, use_cache=True)
    cache, rows = returned_cache(step), [step.logits[0].float()]
    if cache is None:
        return None, None
    for at in range(half, min(half + steps, tokens.shape[1])):
        options = {"position_ids": torch.tensor([[at]])} if placed else {}
        step = _run(model, tokens[:, at : at + 1], tokens, use_cache=True, **cache_argument(cache), **options)
        cache = returned_cache(step)
        rows.append(step.logits[0].float())
    cached = torch.cat(rows)
    error = float((cached - logits[: len(cached)]).abs().max() / logits.abs().max().clamp_min(1e-6))
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(getattr(layer, "keys", None), Tensor)]
    layouts = None if model.config.is_encoder_decoder else config_layouts(model.config, itemsize=4)
    if layouts is None or not layers:
        return error, None
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return error, {"tokens": len(cached), "measured": measured, "layout": cache_bytes(layouts, len(cached))}


def _compare(
    logits: Tensor, opened: Source, tokens: Tensor, cached: bool, count: _Count
) -> tuple[dict[str, float], float | None]:
    """How far the source's logits are from these, and its own cache error where that is asked for."""
    source = opened.id
    config = resolve_config(opened.config, source)
    if (limit := steady_length(config)) is not None and limit < tokens.shape[1]:  # the result reads longer texts
        tokens, logits = tokens[:, :limit], logits[:limit]
    model = _open(opened, config)
    count.expect(model, 0)
    theirs = _logits(model, tokens)
    if theirs.shape != logits.shape:
        raise VerificationError(
            f"{source}: has a vocabulary of {theirs.shape[-1]}, the converted model one of {logits.shape[-1]}; "
            "give the model that was converted"
        )
    if not bool(torch.isfinite(theirs).all()):
        raise VerificationError(f"{source}: its logits are not finite, so nothing can be compared with it; check it")
    apart = distances(theirs, logits)
    found = {
        "positions": float(len(apart.kl)),
        "mean_kl": apart.mean_kl,
        "top1_agreement": apart.top1_agreement,
        "max_difference": apart.largest,
    }
    return found, _cached(model, tokens, theirs)[0] if cached else None
