"""How far the logits of two computations of the same function may differ: by dtype, and by measured rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import VerificationError
from rehead.models.distance import difference
from rehead.models.predictions import Predictions, predict
from rehead.models.probing import HALF, allowed, dtype_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest allowed difference of logits, as a share of their largest magnitude (at least 1)."""

ROUNDINGS = 2
"""Logits in 16 bits may differ by this many times the effect of one more rounding per layer."""


def allowance(plain: Predictions, tolerance: float | None = None) -> float:
    """The allowed difference of logits: ``tolerance``, or :data:`TOLERANCE` by dtype, times the largest logit."""
    return allowed(plain, TOLERANCE.get(plain.dtype, 1e-5) if tolerance is None else tolerance)


def by_rounding(model: nn.Module, moved: float, plain: Predictions) -> float:
    """The difference of logits that 16-bit rounding alone explains; 0 for a model in float32 or float64.

    Args:
        model: the unpatched model.
        moved: the result of :func:`rounding` for it.
        plain: its predictions.

    Raises:
        VerificationError: rounding alone moves logits about as far as they go, so comparing them proves nothing.
    """
    largest = allowed(plain, 1.0)
    if not ROUNDINGS * moved <= largest / 2:
        dtype = str(dtype_of(model)).removeprefix("torch.")
        raise VerificationError(
            f"{type(model).__name__} cannot be proved in {dtype}: one more rounding per layer moves its logits by "
            f"{moved:.1e} (the largest is {largest:.1e}); prove it in float32, model.float()"
        )
    return ROUNDINGS * moved


def rounding(model: nn.Module, names: list[str], inputs: dict[str, Any], plain: Predictions) -> float:
    """How far logits move when what the named modules return is rounded once more, at random.

    Two exact computations that add in another order differ by about that. In 16 bits a deep model, or one that routes
    tokens to experts, can amplify one rounding per layer many times.

    Args:
        model: the unpatched model.
        names: modules whose outputs are rounded.
        inputs: arguments of its forward pass.
        plain: its predictions for them.

    Returns:
        The largest difference of two trials; 0 in float32 and float64.
    """
    if dtype_of(model) not in HALF:
        return 0.0

    def again(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.dtype not in HALF:
            return None
        # Half a unit in the last place to either side.
        share = torch.finfo(first.dtype).eps * (torch.rand(first.shape, device=first.device) - 0.5)
        first = torch.addcmul(first.float(), first.float(), share).to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(again) for name in names]
    try:
        return max(difference(predict(model, inputs), plain) for _ in range(2))
    finally:
        for hook in hooks:
            hook.remove()
