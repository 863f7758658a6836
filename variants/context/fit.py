"""Fitting how much slower each rotary pair turns in long texts, by the loss on text whose positions jump.

A row of ordinary length stands for a long one: its second half is read at positions that begin far behind those of its
first (PoSE, Zhu et al. 2023, arXiv 2309.10400), and in every other row it says the first half again, so that looking
back across the jump is worth something. One number for each rotary pair is moved, and no weight; the loss is that of
all tokens, near and far. So pairs are slowed down as far as reading across the jump needs it and no further.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rehead.errors import UnsupportedError
from rehead.models import probing
from rehead.models.families.resolve import table_entry
from rehead.models.rotation import frequencies, rope_kind
from rehead.variants.context.classes import rotating, trained_length
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.rope import stretch, yarn_factors

STEPS, RATE, ROWS = 40, 0.05, 2
"""Steps of the fit, their rate on the exponent of each factor, and rows read in each."""


@dataclass(frozen=True)
class Fitted:
    """Fitted factors.

    Attributes:
        factors: how much slower each rotary pair turns in long texts, 1 or more.
        before, after: loss on rows that were not fitted to, nats per token, under YaRN's factors and these.
    """

    factors: list[float]
    before: float
    after: float


def fit_factors(
    model: nn.Module,
    tokens: Tensor,
    options: ContextOptions,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Fitted:
    """Fit the factors of a live model's rotary pairs to text.

    Args:
        model: a causal language model that rotates by default RoPE, the same way in all layers.
        tokens: int [N, S], no longer than it was trained for.
        options: what is asked for.
        steps: of Adam.
        seed: of rows and jumps.
        progress: called with (steps done, steps).

    Raises:
        UnsupportedError: layers that rotate differently, or a class whose rotary embedding is not known.
    """
    whole: Any = model
    config = whole.config.get_text_config(decoder=True)
    kind = str(config.model_type)
    family = table_entry(config)
    assert family is not None
    layers = rotating(config, family)
    if {rope_kind(config, layer) for layer in layers} != {"default"} or len(_rotaries(model)) != 1:
        raise UnsupportedError(f"{kind}: its layers rotate in several ways, so no one set of factors fits; give yarn")
    dims, trained = family.rotary_dims(config, layers[0]), trained_length(config, options)
    factor = stretch(trained, options)
    start = yarn_factors(float(config.rope_parameters["rope_theta"]), dims, trained, factor)
    base = frequencies(config, layers[0], dims).to(next(model.parameters()).device)
    # The share of the stretch that each pair takes part in, on a logarithmic scale, so that factors stay within it.
    share = torch.tensor([math.log(each) / math.log(factor) for each in start], device=base.device)
    share = share.clamp(0.02, 0.98).logit().requires_grad_()
    draw = torch.Generator().manual_seed(seed)
    held = _rows(tokens[-max(1, len(tokens) // 4) :], 4 * ROWS, options.tokens, draw)
    fitted_on = tokens[: max(1, len(tokens) - len(tokens) // 4)]
    optimizer = torch.optim.Adam([share], RATE * 4)

    def factors() -> Tensor:
        return factor ** share.sigmoid()

    with probing.frozen(model), _unweighted(model):
        with torch.no_grad(), _turning(model, base / torch.tensor(start, device=base.device)):
            before = _loss(model, held)
        for step in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad(), _turning(model, base / factors()):
                loss = _mean_loss(model, _rows(fitted_on, ROWS, options.tokens, draw))
                loss.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps)
        with torch.no_grad(), _turning(model, base / factors()):
            after = _loss(model, held)
    made = [round(max(1.0, float(each)), 6) for each in factors().detach()]
    return Fitted(made if after < before else [round(each, 6) for each in start], before, min(before, after))


def _rows(tokens: Tensor, count: int, context: int, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Rows [1, S] with their positions [1, S]; the second half of every other row repeats the first."""
    length = tokens.shape[1] // 2 * 2
    rows = []
    for at in range(count):
        row = tokens[int(torch.randint(len(tokens), (1,), generator=draw))][:length].clone()
        if at % 2:
            row[length // 2 :] = row[: length // 2]
        jump = int(torch.randint(max(1, context - length) + 1, (1,), generator=draw))
        place = torch.arange(length)
        place[length // 2 :] += jump
        rows.append((row[None], place[None]))
    return rows


def _mean_loss(model: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    device = next(model.parameters()).device
    total: Any = 0.0
    for row, place in rows:
        logits = model(input_ids=row.to(device), position_ids=place.to(device), use_cache=False).logits
        total = total + F.cross_entropy(logits[0, :-1].float(), row[0, 1:].to(device))
    return total / len(rows)  # type: ignore[no-any-return]


def _loss(model: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> float:
    return sum(float(_mean_loss(model, [row])) for row in rows) / len(rows)


def _rotaries(model: nn.Module) -> list[nn.Module]:
    named = [part for part in model.modules() if "RotaryEmbedding" in type(part).__name__]
    return [part for part in named if isinstance(getattr(part, "inv_freq", None), Tensor)]


@contextmanager
def _unweighted(model: nn.Module) -> Iterator[None]:
    """Inside the block no weight takes a gradient."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def _turning(model: nn.Module, angles: Tensor) -> Iterator[None]:
    """Inside the block rotary pairs turn by these angles, [P], which gradients reach."""
    rotary = _rotaries(model)[0]
    before = rotary._buffers["inv_freq"]
    plain = inspect.unwrap(type(rotary).forward)  # without torch.no_grad
    try:
        rotary._buffers["inv_freq"] = angles
        rotary.__dict__["forward"] = lambda *args, **kwargs: plain(rotary, *args, **kwargs)
        yield
    finally:
        rotary._buffers["inv_freq"] = before
        rotary.__dict__.pop("forward", None)
