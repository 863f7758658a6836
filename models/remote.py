"""Read a checkpoint that came with remote code as one of transformers' own classes, without running that code."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.opening import open_source
from rehead.checkpoints.source import LocalSource, Source
from rehead.errors import UnsupportedError
from rehead.lazy import late
from rehead.models.config import resolve_config
from rehead.models.families.remote import REMOTE, RemoteLayout
from rehead.models.families.spec import Family
from rehead.models.families.table import FAMILIES
from rehead.models.rewrite import Builder, Rewrite
from rehead.models.rewritten_source import RewrittenSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

#: The name of the Rewrite from a remote layout to its host's.
LAYOUT = "layout"

# Keys that mean the same in every config; None where a config lacks one, since the host's default is another model's.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAME = ("vocab_size", "hidden_size", "initializer_range", "use_cache", "tie_word_embeddings", "dtype", "torch_dtype")


def open_known(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """As :func:`~rehead.checkpoints.opening.open_source`, in the layout that transformers has for it.

    Raises:
        UsageError: there is no such model.
        UnsupportedError: as ``open_source``; or its layout is known and no class of transformers computes the same.
    """
    return in_known_layout(open_source(model, revision))


def in_known_layout(source: Source) -> Source:
    """A source in the layout of a class in transformers: itself, or if it has a remote layout, a view of it.

    Raises:
        UnsupportedError: no class of transformers computes the same, or config and tensors do not belong together.
    """
    layout = REMOTE.get(str(source.config.get("model_type")))
    if layout is None or isinstance(source, RewrittenSource):
        return source
    return RewrittenSource(source, _rewrite(source, layout))


def layout_facts(source: Source) -> dict[str, Any] | None:
    """What became of a remote layout: its model type before and after, and notes; None for any other source."""
    is_view = isinstance(source, RewrittenSource) and source.rewrite.name == LAYOUT
    return source.rewrite.facts if is_view else None  # type: ignore[attr-defined]


def in_view_rounds(source: Source) -> bool:
    """Whether weights are computed, not only renamed and split, to read a source in another layout."""
    return isinstance(source, RewrittenSource) and source.rewrite.rounds


def weights_for_loading(source: Source, place: str) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` loads a source: its place, or the tensors of a view in memory."""
    if layout_facts(source) is None:
        folder = source.folder if isinstance(source, LocalSource) else place
        return {"pretrained_model_name_or_path": str(folder)}
    tensors = {name: source.read(name) for name in source.tensors}
    return {"pretrained_model_name_or_path": None, "state_dict": tensors}


def _rewrite(source: Source, layout: RemoteLayout) -> Rewrite:
    raw, kind = source.config, str(source.config["model_type"])
    try:
        reason = layout.refusal(raw)
        if reason is None:
            config = _config(raw, layout)
    except KeyError as error:
        raise UnsupportedError(f"{source.id}: config.json has no {error.args[0]}, which {kind} needs; fix it") from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UnsupportedError(f"{source.id}: config.json is not a valid {kind} config ({error}); fix it") from None
    if reason is not None:
        raise UnsupportedError(f"{kind}: {reason}")
    try:
        return _built(source, layout, config)
    except (RuntimeError, ValueError):
        raise UnsupportedError(
            f"{source.id}: its tensors do not have the shapes that config.json claims for a {kind}; check that they "
            "belong together"
        ) from None


def _built(source: Source, layout: RemoteLayout, config: dict[str, Any]) -> Rewrite:
    raw, kind = source.config, str(source.config["model_type"])
    family = replace(layout.family(raw) if layout.family else Family(kind), layer=layout.layer)
    host = replace(FAMILIES[layout.host], layer=layout.host_layer)
    build = Builder(family, host, resolve_config(config, source.id), raw, source.tensors, LAYOUT)
    step = build.attention(lambda heads, layer, read: heads, lambda layer: ()) if layout.family else None
    for old, new in layout.outer.items():
        if new == "lm_head" and layout.unit_head(raw):
            build.make("lm_head.weight", (f"{old}.weight",), _unit_rows, rounds=True)
        elif build.has(f"{old}.weight"):
            build.pair(new, old)
    for layer in range(build.config.num_hidden_layers):
        before, after = layout.layer.format(i=layer), layout.host_layer.format(i=layer)
        for old, new in layout.inner.items():
            if build.has(f"{before}{old}.weight"):
                build.pair(after + new, before + old)
    rewrite = build.finish(config, step, layout.buffers)
    note = layout.note(raw)
    rewrite.facts.update({"before": kind, "after": layout.host, **({"note": note} if note else {})})
    return rewrite


def _config(raw: Any, layout: RemoteLayout) -> dict[str, Any]:
    same = {key: raw[key] for key in _SAME if key in raw} | {key: raw.get(key) for key in _SPECIAL}
    same.setdefault("tie_word_embeddings", layout.host == "falcon")
    named = {"model_type": layout.host, "architectures": [layout.architecture]}
    return {**same, **layout.config(raw), **named}


def _unit_rows(weight: Tensor) -> Tensor:
    """Rows [vocabulary, n] scaled to length one."""
    if weight.is_meta:
        return weight
    return torch.nn.functional.normalize(weight.float()).to(weight.dtype)
