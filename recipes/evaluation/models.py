"""The compared models: loaded as plain transformers loads them, and described."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.opening import split_revision
from rehead.checkpoints.source import Source, torch_dtype
from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.errors import UnsupportedError, UsageError, first_line
from rehead.models.cache_layouts import config_layouts
from rehead.models.layout import LayerLayout
from rehead.models.probing import config_value
from rehead.models.remote import open_known, weights_for_loading
from rehead.options import named_options
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.kv_cache import measure_cache, stated_heads
from rehead.recipes.evaluation.options import EvaluateOptions

TILED = "tiled"


@dataclass
class JudgedModel:
    """A live model with its tokenizer and facts.

    Attributes:
        who: its part in the comparison.
        name: as the user wrote it.
        model: a transformers causal language model in evaluation mode.
        dtype: of the checkpoint's weights.
        weight_bytes: of its tensors.
        tokenizer: None where the checkpoint has none.
        patches: that are applied, in their order.
        patched_with: what they were asked for as, ``NAME:key=value``.
    """

    who: schema.Who
    name: str
    model: Any
    dtype: torch.dtype
    weight_bytes: int
    tokenizer: Any = None
    patches: list[Any] = field(default_factory=list, repr=False)
    patched_with: tuple[str, ...] = ()

    def layouts(self) -> list[LayerLayout] | None:
        """What each layer caches, by the config and the variants on top; None where the config does not say."""
        layers = config_layouts(self.model.config, self.dtype.itemsize)
        for part in (part for patch in self.patches for part in patch.parts):
            changed = {state.index for state in part.states}
            layers = layers and [
                part.variant.layout(layer, part.options) if layer.index in changed else layer for layer in layers
            ]
        return layers

    def facts(self) -> schema.ModelFacts:
        """What the document says of it."""
        parameters = list(self.model.parameters())
        cache = measure_cache(self.model)
        scale = self.dtype.itemsize / next(self.model.parameters()).element_size()
        manifest = _manifest(self.name)
        heads = config_value(self.model.config.get_text_config(decoder=True), "num_attention_heads")
        return schema.ModelFacts(
            name=self.name,
            model_type=self.model.config.model_type,
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=self.weight_bytes,
            num_attention_heads=heads if isinstance(heads, int) else None,
            num_key_value_heads=stated_heads(self.model.config, cache.heads) if cache else [],
            head_dim=cache.head_dim if cache else None,
            kv_bytes_per_token=scale * cache.bytes_per_token if cache else None,
            patches=list(self.patched_with),
            conversion=_conversion(manifest),
            uptraining=manifest.get("uptraining") if isinstance(manifest.get("uptraining"), dict) else None,
        )


def load_model(
    who: schema.Who,
    name: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    attention: str | None = None,
    patches: Sequence[str] = (),
) -> JudgedModel:
    """Load a checkpoint for evaluation, and patch it.

    Args:
        who: its part in the comparison.
        name: a folder, a Hub id, or ``id@revision``.
        device: where it goes.
        dtype: ``auto`` is float32 on a CPU and the checkpoint's own elsewhere.
        attention: transformers' attention implementation, or ``tiled`` for Rehead's; its own choice when None.
        patches: variants that are put on it, each on top of those before, as ``NAME`` or ``NAME:key=value,...``.

    Raises:
        UsageError: no such model, or an attention implementation that it does not have.
        UnsupportedError: a checkpoint that plain transformers does not load (pickles, remote code, missing tensors),
            or one that does not fit into memory.
    """
    from rehead.console import quiet_transformers
    from rehead.models.config import causal_lm_class, resolve_config

    source = open_named(name)
    place = source.id
    config = resolve_config(source.config, place)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name}: is an encoder-decoder, which does not continue running text; evaluate decoder-only models"
        )
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device.type == "cpu":
        wanted = torch.float32
    extra: dict[str, Any] = {} if attention in (None, TILED) else {"attn_implementation": attention}
    with quiet_transformers():
        try:
            found: Any = causal_lm_class(config).from_pretrained(
                **weights_for_loading(source, place),
                config=copy.deepcopy(config),  # transformers' own also where a record stood for it
                revision=source.revision or "main",
                dtype=wanted,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
            )
            model, report = found[0].to(device).eval(), found[1]
        except torch.OutOfMemoryError:
            raise UnsupportedError(
                f"{name}: does not fit on {device}; use --dtype bfloat16 or another device"
            ) from None
        except Exception as error:
            if attention is not None and ("attn_implementation" in str(error) or "flash" in str(error).lower()):
                raise UsageError(f"--attention {attention}: {first_line(error)}") from None
            raise UnsupportedError(
                f"{name}: transformers does not load it ({first_line(error)}); check the checkpoint"
            ) from None
    if report["missing_keys"] or report.get("mismatched_keys"):
        lost = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))[0]
        raise UnsupportedError(f"{name}: tensor {lost} is missing or misshapen and would be random; fetch it again")
    size = sum(info.nbytes for info in source.tensors.values())
    loaded = JudgedModel(who, name, model, stored_dtype(source), size, tokenizer_of(source))
    return patched(loaded, [*((TILED,) if attention == TILED else ()), *patches])


def patched(loaded: JudgedModel, patches: Sequence[str]) -> JudgedModel:
    """The same model with variants on top of each other.

    Raises:
        UsageError: an unknown variant or option.
        UnsupportedError: the model cannot be patched so.
    """
    if not patches:
        return loaded
    from rehead.patches import patch_model

    for name, options in read_patches(patches):
        loaded.patches.append(patch_model(loaded.model, name, calibration=_text_for(loaded, name, options), **options))
        loaded.patches[-1].apply()
    loaded.patched_with = tuple(patches)
    return loaded


def _text_for(loaded: JudgedModel, name: str, options: dict[str, Any]) -> Tensor | None:
    """Tokens of the text that ships with Rehead, for a variant that is fitted to text; None for others."""
    from rehead.data.calibration import calibration_tokens
    from rehead.variants.contract import VARIANTS

    variant = VARIANTS.get(name)
    asked = variant.options.parse(options)
    if variant.calibrate is None or not variant.needs(asked) or loaded.tokenizer is None:
        return None
    length = max(1024, 4 * variant.reach(asked))
    return calibration_tokens(loaded.tokenizer, max(8192, length), length)


def read_patches(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """``["window:size=1k"]`` as variants' names and what :func:`rehead.patches.patch_model` takes.

    Raises:
        UsageError: an unknown variant or option (the nearest is suggested), an invalid value, a variant that is named
            twice, or one that changes checkpoints only.
    """
    from rehead.patches.patch import live_names
    from rehead.variants.contract import VARIANTS

    patches: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, options = named_options(text, lambda name: VARIANTS.get(name).options, "--patch")
        if name in patches:
            raise UsageError(f"--patch {name}: is given twice; give all of its options once")
        if name not in live_names():
            raise UsageError(f"--patch {name}: changes checkpoints only; convert the model with it and evaluate that")
        patches[name] = dict(options)
    return list(patches.items())


def wider_than_read(loaded: JudgedModel, options: EvaluateOptions) -> str | None:
    """A note where a variant's window leaves every text unchanged, since no more of it is read at once.

    Raises:
        UsageError: nothing else that is measured reads more, so nothing would be measured.
    """
    read = options.window if "rolling" in options.conventions else options.window - 1
    most = max([read, *options.needle, *options.recall, *(options.speed_context if options.speed else ())])
    for text, patch in zip(loaded.patched_with, loaded.patches[-len(loaded.patched_with) :]):
        seen = [
            layer.window + layer.sinks
            for layer in loaded.layouts() or []
            for part in patch.parts
            if layer.window is not None and any(state.index == layer.index for state in part.states)
        ]
        if seen and min(seen) >= read:
            said = f"--patch {text}: lets each token see {min(seen):,} tokens, and a text is read {read:,} at a time"
            if min(seen) >= most:
                raise UsageError(
                    f"{said}, so nothing would change; give a larger --window, or the variant a smaller size"
                )
            return f"{said}, so its perplexity and KL are the model's own"
    return None


def at_revision(name: str, revision: str | None) -> str:
    """``id@revision`` of a Hub model.

    Raises:
        UsageError: the name is a folder's, or has a revision already.
    """
    if revision is None:
        return name
    if Path(name).exists():
        raise UsageError(f"{name}: is on this machine and has no revisions; leave --revision out")
    if split_revision(name)[1] is not None:
        raise UsageError(f"{name}: says its revision itself; leave --revision out")
    return f"{name}@{revision}"


def open_named(name: str) -> Source:
    """The checkpoint of a folder, a Hub id, or ``id@revision``; raises as ``open_source``."""
    return open_known(*split_revision(name))


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a checkpoint's weights."""
    sizes: Counter[str] = Counter()
    for info in source.tensors.values():
        sizes[info.dtype] += info.nbytes
    return torch_dtype(sizes.most_common(1)[0][0])


def tokenizer_of(source: Source) -> Any:
    """A checkpoint's tokenizer, or None where it has none that loads."""
    try:
        return open_tokenizer(source)
    except Exception:
        return None


def require_same_tokenizer(baseline: JudgedModel, other: JudgedModel) -> None:
    """Raise UsageError where two models would not read a text as the same tokens."""
    if other is baseline:
        return
    from rehead.recipes.evaluation.divergence import require_same_vocabulary

    require_same_vocabulary(baseline.model, other.model, other.name, baseline.name)
    if baseline.tokenizer is None or other.tokenizer is None:
        return
    if baseline.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UsageError(
            f"{other.name}: its tokenizer's vocabulary is not {baseline.name}'s, so their predictions cannot be "
            "compared; give the model that it was made from, or leave the baseline out and compare bits per byte"
        )


def _manifest(name: str) -> dict[str, Any]:
    """The manifest of a folder that Rehead wrote; empty for any other model."""
    from rehead.checkpoints.manifest import MANIFEST_NAME, read_manifest
    from rehead.errors import ReheadError

    folder = Path(name)
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    try:
        return read_manifest(folder)
    except ReheadError:
        return {}


def _conversion(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What a reader of a report wants to know of a conversion."""
    found = manifest.get("conversion") or manifest
    if not isinstance(found, dict) or "options" not in found or "num_key_value_heads" not in found:
        return None
    kept = (
        "source",
        "revision",
        "num_key_value_heads",
        "kv_bytes_per_token",
        "parameters",
        "exact",
        "options",
        "latent",
    )
    return {key: found[key] for key in kept if key in found}
