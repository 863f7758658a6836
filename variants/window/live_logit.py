"""Sink logits of a live model, fitted to text in one forward pass: each layer's once its inputs are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rehead.attention.attend import attend_with_lse
from rehead.attention.call import AttentionCall
from rehead.errors import UsageError
from rehead.models import probing
from rehead.variants.contract import Compute
from rehead.variants.window import FITTING, WindowOptions
from rehead.variants.window.sink_logit import best, errors

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

    metrics = {id(state.tensors["sinks"]): _metric(live.model, state.name) for state in live.states if state.tensors}

    def fit(call: AttentionCall, narrowed: AttentionCall, sinks: Tensor, compute: Compute) -> Tensor | None:
        whole = compute(call)
        kept, lse = attend_with_lse(narrowed.with_(sinks=None))
        sums = errors(whole.transpose(1, 2), kept.transpose(1, 2), lse, metrics.get(id(sinks)))
        sinks.data.copy_(best(sums, options.sinks))
        return None if sequential else whole

    body: Any = getattr(live.model, "base_model", live.model)
    token = FITTING.set(fit)
    try:
        with probing.frozen(live.model), torch.no_grad():
            body(input_ids=rows, use_cache=False)
    finally:
        FITTING.reset(token)


def _metric(model: nn.Module, name: str) -> Tensor | None:
    """The quadratic form of a layer's heads' errors in its output, [H, D, D]; None where it is not known."""
    attention = model.get_submodule(name)
    output = next((m for part in OUTPUTS if isinstance(m := getattr(attention, part, None), nn.Linear)), None)
    size = getattr(attention, "head_dim", None)
    if output is None or not isinstance(size, int) or output.weight.is_meta:
        return None
    by_head = output.weight.detach().float().unflatten(1, (-1, size))
    return torch.einsum("mhd,mhe->hde", by_head, by_head)
