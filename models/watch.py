"""Run a model up to some module, and observe what it computes there.

:func:`until` and :func:`until_after` stop a forward pass at a module. :func:`observing` shows attention: queries, keys
and probabilities. It goes through transformers' attention interface under a name of its own, so norms, rotary
positions, windows, sinks and soft caps are computed by the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn

PROBE = "rehead_probe"
PLAIN = "rehead_plain"


class Reached(Exception):
    """Raised to end a forward pass at the point where it should stop."""


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """Keep a hook inside the block and remove it at the end."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def until(module: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """A forward pass inside the block stops before ``module``, and the block ends there without an error.

    Args:
        look: called with the module's positional and keyword arguments; the module itself is not run.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(args, kwargs)
        raise Reached

    with hooked(module.register_forward_pre_hook(stop, with_kwargs=True)), _ended():
        yield


@contextmanager
def until_after(module: nn.Module, look: Callable[[Any], None]) -> Iterator[None]:
    """As :func:`until`, but stop after ``module``; ``look`` is called with its output."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        look(output)
        raise Reached

    with hooked(module.register_forward_hook(stop)), _ended():
        yield


@contextmanager
def _ended() -> Iterator[None]:
    """Take no notice of :class:`Reached`.

    Its frames hold what the layer computed, and one of them, in Python 3.12, holds the exception: a circle that keeps
    all of it until Python looks for circles. Without its traceback, everything is freed at once.
    """
    try:
        yield
    except Reached as reached:
        reached.__traceback__ = None


@dataclass(frozen=True)
class Seen:
    """What one attention call computed, for R observed queries.

    Attributes:
        queries: the observed queries, normed and rotated, [b, H, R, D].
        keys, values: [b, K, S, D].
        scores: scaled dot products before soft cap and mask, [b, H, R, S].
        masked: scores after soft cap and mask, [b, H, R, S].
        probabilities: [b, H, R, S].
        visible: which keys a query may see, broadcastable to the scores.
        scaling: the factor on the dot products.
        rows: positions of the queries, int64 [R].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    masked: Tensor
    probabilities: Tensor
    visible: Tensor
    scaling: float
    rows: Tensor


Observer = Callable[[Seen], None]

#: Observers, each with the positions of the queries to show it, int64 [R]; per thread.
_observers: ContextVar[tuple[tuple[Observer, Tensor], ...]] = ContextVar("rehead_observers", default=())


def probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rules: Any
) -> Never:
    """Compute plain attention for the observed queries, show it to the observers, and end the forward pass.

    Other queries are not computed, so a long sequence costs R x S memory, not S x S.

    Args:
        query: [b, H, S, D]; key, value: [b, K, S, D].
        attention_mask: additive or boolean, [b or 1, 1 or H, S, S]; None for causal.
        rules: what else transformers hands to attention; see :func:`_seen`.

    Raises:
        Reached: always, when all have seen it.
    """
    for observer, rows in _observers.get():
        observer(_seen(query, key, value, rows, attention_mask, **rules))
    raise Reached


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rules: Any
) -> tuple[Tensor, None]:
    """The same attention for all queries, as its output [b, S, H, D]; for the few of a decoding step.

    Other implementations copy keys and values for each query head where a mask is given, at every step.
    """
    every = torch.arange(query.shape[2], device=query.device)
    seen = _seen(query, key, value, every, attention_mask, **rules)
    grouped = seen.probabilities.to(value.dtype).unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value
    return grouped.unflatten(2, (-1, len(every))).flatten(1, 2).transpose(1, 2).contiguous(), None


def _seen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Seen:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[:, :, rows]
    grouped = queries.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the queries of a KV head in one product
    products = (grouped @ key.transpose(-1, -2)).reshape(*query.shape[:2], len(rows), -1).float() * scale
    scores = products if softcap is None else softcap * torch.tanh(products / softcap)
    if attention_mask is None:
        visible = (torch.arange(key.shape[2], device=key.device) <= rows[:, None])[None, None]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    elif attention_mask.dtype == torch.bool:
        visible = attention_mask[:, :, rows]
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    else:
        mask = attention_mask[:, :, rows]
        visible = mask > torch.finfo(mask.dtype).min / 2
        scores = scores + mask
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)
        probabilities = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return Seen(queries, key, value, products, scores, probabilities, visible, scale, rows)


def register_probe() -> None:
    """Register :func:`probe_attention` with transformers as :data:`PROBE`."""
    _register(PROBE, probe_attention)


def register_plain() -> None:
    """Register :func:`plain_attention` with transformers as :data:`PLAIN`."""
    _register(PLAIN, plain_attention)


def _register(name: str, attention: Callable[..., Any]) -> None:
    """Register an attention implementation with transformers, with the mask of eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def observing(observer: Observer, rows: Tensor) -> Iterator[None]:
    """Show the queries at ``rows`` (int64 [R]) of the probed attention inside the block to ``observer``.

    The block ends at the attention; the rest of the forward pass is not run.
    """
    token = _observers.set((*_observers.get(), (observer, rows)))
    try:
        with _ended():
            yield
    finally:
        _observers.reset(token)
