"""Sink logits of a live model, fitted to text in one forward pass: each layer's once its inputs are known.

Beside sink tokens a logit that brings its own head nearer may still take the model away, so how many heads get one is
decided by the whole model on text that they were not fitted to; none is among the choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rehead.attention.attend import attend_with_lse
from rehead.attention.call import AttentionCall
from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.distance import Distances, distances
from rehead.models.predictions import predict
from rehead.variants.contract import Compute
from rehead.variants.window import WindowOptions, attend, takes_logit
from rehead.variants.window.sink_logit import WORTHS, best, errors, worth

if TYPE_CHECKING:
    from rehead.variants.stack import LiveVariant

OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
"""What classes call the output projection of their attention."""
TOKENS = 8192
"""Tokens that are read at once, and no more."""


def fit_logits(live: LiveVariant, tokens: Tensor, sequential: bool = True) -> None:
    """Fit the sink logits of a window that is applied.

    Args:
        live: the variant on a model.
        tokens: int [B, S].
        sequential: each layer reads what the layers with windows before it give; else what the original's do.

    Raises:
        UsageError: the texts are shorter than four windows.
    """
    tokens, options = probing.checked_tokens(tokens, live.model), live.options
    assert isinstance(options, WindowOptions)
    if tokens.shape[1] < 4 * options.size:
        raise UsageError(
            f"window {options.size}: texts of {tokens.shape[1]} tokens hardly show what it hides; give "
            f"calibration= of {4 * options.size} or more"
        )
    rows = tokens[: max(1, TOKENS // tokens.shape[1])]
    decided = sequential and options.sinks > 0 and len(rows) > 1
    with probing.frozen(live.model):
        sums = _fit(live, rows[::2] if decided else rows, sequential)
        if decided:
            _decide(live, sums, rows[1::2])


def _fit(live: LiveVariant, rows: Tensor, sequential: bool) -> list[tuple[Tensor, Tensor]]:
    """Set each layer's logits as it is reached; returns (its logits, the errors that they were chosen by)."""
    share = worth(live.options.sinks)  # type: ignore[attr-defined]
    metrics = {id(state.tensors["sinks"]): _metric(live.model, state.name) for state in live.states if state.tensors}
    fitted: list[tuple[Tensor, Tensor]] = []

    def fit(call: AttentionCall, options: Any, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
        narrowed = call.narrowed(options.size, options.sinks)
        if not takes_logit(narrowed, options):
            return compute(narrowed)
        whole = compute(call)
        kept, lse = attend_with_lse(narrowed.with_(sinks=None))
        sums = errors(whole.transpose(1, 2), kept.transpose(1, 2), lse, metrics.get(id(state["sinks"])))
        logits = state["sinks"].data
        logits.copy_(best(sums, share))
        fitted.append((logits, sums))
        return attend(call, options, state, compute) if sequential else whole

    body: Any = getattr(live.model, "base_model", live.model)
    with live.computing(fit):
        body(input_ids=rows, use_cache=False)
    return fitted


def _decide(live: LiveVariant, fitted: list[tuple[Tensor, Tensor]], held: Tensor) -> None:
    """Keep the logits of those heads whose share of the error says so, at the limit that is best on ``held``."""
    parts = held.split(1)
    with live.only(()):
        original = [predict(live.model, {"input_ids": part}) for part in parts]

    def apart(share: float) -> Tensor:
        _set(fitted, share)
        pairs = zip(original, parts, strict=True)
        return Distances.cat([distances(one, predict(live.model, {"input_ids": part})) for one, part in pairs]).kl

    none, best_share, most = apart(0.0), 0.0, 0.0
    for share in WORTHS:
        gain = none - apart(share)
        # What a few tokens gain by chance is no reason for a logit.
        if float(gain.mean()) > max(most, 2 * float(gain.std()) / math.sqrt(gain.numel())):
            best_share, most = share, float(gain.mean())
    _set(fitted, best_share)


def _set(fitted: list[tuple[Tensor, Tensor]], share: float) -> None:
    for sinks, sums in fitted:
        sinks.copy_(best(sums, share))


def _metric(model: nn.Module, name: str) -> Tensor | None:
    """The quadratic form of a layer's heads' errors in its output, [H, D, D]; None where it is not known."""
    attention = model.get_submodule(name)
    output = next((m for part in OUTPUTS if isinstance(m := getattr(attention, part, None), nn.Linear)), None)
    size = getattr(attention, "head_dim", None)
    if output is None or not isinstance(size, int) or output.weight.is_meta:
        return None
    by_head = output.weight.detach().float().unflatten(1, (-1, size))
    return torch.einsum("mhd,mhe->hde", by_head, by_head)
