"""How a text goes through a model: as many windows in a forward pass as keep the device busy, and finite figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.predictions import Predictions, predict

#: Tokens of a batch, by the kind of device.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def batch_size(model: Any, window: int, batch_tokens: int | None = None) -> int:
    """Windows in a batch: as many as keep the device busy.

    Args:
        model: a transformers causal language model.
        window: tokens in a window.
        batch_tokens: tokens in a batch; by the kind of device when None.
    """
    kind = next(model.parameters()).device.type
    return max(1, (batch_tokens or _BATCH_TOKENS.get(kind, _BATCH_TOKENS["cuda"])) // window)


def predict_last(model: Any, inputs: Tensor, counted: int) -> Predictions:
    """Predictions ``[b, counted]`` at the last positions of each row.

    Args:
        model: a transformers causal language model.
        inputs: int64 [b, n], on any device.
        counted: positions wanted, at most n.
    """
    return predict(model, {"input_ids": inputs.to(next(model.parameters()).device)}, counted)


def require_finite(values: Tensor, name: str) -> Tensor:
    """Give ``values`` back.

    Raises:
        UnsupportedError: one is not finite; ``name`` is the model that gave it.
    """
    if not bool(torch.isfinite(values).all()):
        at = int((~torch.isfinite(values)).nonzero()[0])
        raise UnsupportedError(
            f"{name}: gives no finite probability for token {at} of the text; check its weights, or try --dtype float32"
        )
    return values
