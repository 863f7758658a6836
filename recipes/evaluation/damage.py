"""Damage by layer: each layer of the converted model alone in the baseline, everything else as it was.

The layer's whole module is borrowed, with its own config and number of KV heads, so nothing here knows any
architecture; the baseline gets its own layer back however the measurement ends, and not a bit of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rehead.data.beginning import IGNORED, NO_START
from rehead.errors import UnsupportedError
from rehead.models.distance import distances
from rehead.models.live import decoder_layers, evaluating
from rehead.models.predictions import batch_size
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.windows import batches, cut, predict_last, require_finite


def layer_damage(
    baseline: Any, model: Any, tokens: Tensor, window: int = 512, *, name: str = "the model", **options: Any
) -> list[schema.LayerDamage]:
    """KL(baseline || baseline with one layer of ``model``), for each layer that differs.

    Args:
        baseline, model: transformers causal language models on one device, whose layers are of the same class or of one
            derived from it.
        tokens: int64 [T], a sample of text; one pass over it for each layer.
        window: tokens in a window; the windows are disjoint.
        name: of the model, for messages.
        **options: as for :func:`damage_of`.

    Raises:
        UnsupportedError: layers cannot be found or are of another class or width.
        UsageError: the text is shorter than one window.
    """
    ours, theirs = decoder_layers(model), decoder_layers(baseline)
    _require_alike(theirs, ours, name)
    _require_width(baseline, model, name)
    changed = [i for i, pair in enumerate(zip(theirs, ours)) if _differ(*pair)]

    def alone(layer: int) -> AbstractContextManager[None]:
        return borrowed(theirs, layer, ours[layer])

    return damage_of(changed, alone, baseline, baseline, tokens, window, name=name, **options)


def patch_damage(
    baseline: Any, model: Any, patches: Sequence[Any], tokens: Tensor, window: int = 512, **options: Any
) -> list[schema.LayerDamage]:
    """KL(baseline || model with its patches on one layer alone), for each layer that they change.

    Args:
        baseline: the model as it is.
        model: the same with patches, which stay.
        patches: that are applied to it (:class:`rehead.patches.Patch`).
        tokens: int64 [T], a sample of text; one pass over it for each layer.
        window: tokens in a window; the windows are disjoint.
        **options: as for :func:`damage_of`.
    """
    parts = [part for patch in patches for part in patch.parts]
    changed = sorted({state.index for part in parts for state in part.states if state.index is not None})

    @contextmanager
    def alone(layer: int) -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.only([layer]))
            yield

    return damage_of(changed, alone, baseline, model, tokens, window, **options)


def damage_of(
    changed: Sequence[int],
    alone: Callable[[int], AbstractContextManager[None]],
    baseline: Any,
    model: Any,
    tokens: Tensor,
    window: int = 512,
    *,
    start: Tensor = NO_START,
    batch_tokens: int | None = None,
    name: str = "the model",
    progress: Callable[[float, float], None] | None = None,
) -> list[schema.LayerDamage]:
    """KL(baseline || model with one layer changed), for each of several layers.

    Args:
        changed: indices of the layers.
        alone: gives a block in which ``model`` has that one layer changed.
        baseline: as it is outside such blocks.
        model: that is run inside them; may be ``baseline`` itself.
        tokens: int64 [T], a sample of text; one pass over it for each layer.
        window: tokens in a window; the windows are disjoint.
        start: int64 [p], how the tokenizer begins a text (:func:`rehead.data.beginning.text_start`).
        batch_tokens: tokens in a forward pass; by the device when None.
        name: of the model, for messages.
        progress: called with (passes done, passes).

    Raises:
        UsageError: the text is shorter than one window.
        UnsupportedError: a token is given no finite probability.
    """
    windows = cut("disjoint", len(tokens), window)
    kl = torch.zeros(len(changed), dtype=torch.float64)
    agree = torch.zeros(len(changed), dtype=torch.float64)
    counted = done = 0
    with evaluating(baseline, model):
        for inputs, targets in batches(tokens, windows, batch_size(baseline, window, batch_tokens), start):
            whole = predict_last(baseline, inputs, targets.shape[1])
            kept = (targets != IGNORED).flatten()
            counted += int(kept.sum())
            for at, layer in enumerate(changed):
                with alone(layer):
                    part = distances(whole, predict_last(model, inputs, targets.shape[1]))[kept]
                kl[at] += require_finite(part.kl, f"{name}, layer {layer}").sum()
                agree[at] += part.agree.sum()
            done += len(inputs)
            if progress is not None:
                progress(done, len(windows))
    return [
        schema.LayerDamage(
            layer=layer, kl=float(kl[at] / counted), top1_agreement=float(agree[at] / counted), tokens=counted
        )
        for at, layer in enumerate(changed)
    ]


@contextmanager
def borrowed(layers: nn.ModuleList, index: int, layer: nn.Module) -> Iterator[None]:
    """Put another module in a layer's place inside the block."""
    own = layers[index]
    layers[index] = layer
    try:
        yield
    finally:
        layers[index] = own


def _require_width(baseline: Any, model: Any, name: str) -> None:
    """Layers pass hidden states on, and get their rotary angles from the model around them."""
    ours, theirs = (one.config.get_text_config(decoder=True) for one in (model, baseline))
    for key in ("hidden_size", "head_dim"):
        mine, other = (getattr(config, key, None) for config in (ours, theirs))
        if mine is not None and other is not None and mine != other:
            raise UnsupportedError(
                f"{name}: has a {key} of {mine} and the baseline one of {other}, so its layers cannot stand alone in "
                "the baseline; leave --damage out"
            )


def _require_alike(theirs: nn.ModuleList, ours: nn.ModuleList, name: str) -> None:
    if len(theirs) != len(ours):
        raise UnsupportedError(
            f"{name}: has {len(ours)} layers and the baseline {len(theirs)}, so none stands for another; "
            "leave --damage out"
        )
    for index, (theirs_i, ours_i) in enumerate(zip(theirs, ours)):
        # One class derived from the other is called as the other is: parallel blocks are such.
        if not isinstance(ours_i, type(theirs_i)) and not isinstance(theirs_i, type(ours_i)):
            raise UnsupportedError(
                f"{name}: layer {index} is a {type(ours_i).__name__} and the baseline's a {type(theirs_i).__name__}, "
                "which cannot stand in for one another; leave --damage out"
            )


def _differ(first: nn.Module, second: nn.Module) -> bool:
    """Whether two layers differ in class, or in any parameter or buffer."""
    if type(first) is not type(second):
        return True
    ours, theirs = first.state_dict(), second.state_dict()
    if ours.keys() != theirs.keys():
        return True
    return not all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
