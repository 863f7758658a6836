"""From logits to numbers for each token, a chunk of tokens at a time: no wide [tokens, vocabulary] tensor is whole.

Softmax and sums are in float64, whatever the model computes in: beside a forward pass they cost little, and divergences
of 1e-6 nats, which a careful conversion or another attention kernel leaves, are then figures and not rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError

#: Bytes of one chunk's wide logits: cache-sized on a CPU, large enough to fill a GPU.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
#: Bytes of one batch's logits in the model's dtype, and tokens of a batch.
_BATCH_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class TokenDivergence:
    """What two models say of the same tokens, on the CPU; each field [N].

    Attributes:
        kl: float64, KL(baseline || model) in nats.
        agree: bool, whether both find the same token most likely.
        baseline_nll, nll: float64, negative log-likelihood of the right token under each.
    """

    kl: Tensor
    agree: Tensor
    baseline_nll: Tensor
    nll: Tensor


def batch_size(model: Any, window: int, batch_tokens: int | None = None) -> int:
    """Windows in a batch: as many as keep the device busy while their logits stay small beside the model.

    Args:
        model: a transformers causal language model.
        window: tokens in a window.
        batch_tokens: tokens in a batch; by the kind of device when None.
    """
    parameter = next(model.parameters())
    kind = parameter.device.type
    tokens = batch_tokens or _BATCH_TOKENS.get(kind, _BATCH_TOKENS["cuda"])
    width = vocabulary(model) * parameter.element_size()
    return max(1, min(tokens, _BATCH_BYTES.get(kind, _BATCH_BYTES["cuda"]) // width) // window)


def vocabulary(model: Any) -> int:
    """Entries of a model's logits."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def next_logits(model: Any, inputs: Tensor, counted: int) -> Tensor:
    """Logits at the last positions of each row, in the model's dtype and on its device.

    Args:
        model: a transformers causal language model.
        inputs: int64 [b, n].
        counted: positions wanted, at most n.

    Returns:
        [b, counted, V].
    """
    # The head is spared the positions that only serve as context, by the classes that know how.
    keep = {"logits_to_keep": counted} if counted < inputs.shape[1] and keeps_logits(model) else {}
    logits = model(input_ids=inputs.to(next(model.parameters()).device), use_cache=False, **keep).logits
    return logits[:, -counted:]


def keeps_logits(model: Any) -> bool:
    """Whether a model can be asked for the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats.

    Args:
        logits: [N, V], any dtype.
        targets: int64 [N].

    Returns:
        float64 [N] on the CPU.
    """
    targets = targets.to(logits.device)
    found = [-_log_softmax(rows).gather(-1, right[:, None])[:, 0] for rows, right in _chunks(logits, targets)]
    return torch.cat(found).cpu().double()


def token_divergence(baseline: Tensor, logits: Tensor, targets: Tensor) -> TokenDivergence:
    """Compare two models' next-token distributions; equal logits give a divergence of exactly 0.

    Args:
        baseline: its logits [N, V], any dtype.
        logits: the model's [N, V].
        targets: int64 [N], the right tokens.
    """
    logits, targets = logits.to(baseline.device), targets.to(baseline.device)
    kl, agree, first, second = [], [], [], []
    for theirs, ours, right in _chunks(baseline, logits, targets):
        log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
        agree.append(theirs.argmax(-1) == ours.argmax(-1))
        first.append(-log_p.gather(-1, right[:, None])[:, 0])
        second.append(-log_q.gather(-1, right[:, None])[:, 0])
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p)
        # Entries that both rule out (logits of minus infinity) weigh nothing; rounding must not go below nothing.
        kl.append(torch.where(p > 0, terms, 0.0).sum(-1).clamp_min(0))
    numbers = (torch.cat(part).cpu() for part in (kl, first, second))
    divergence, before, after = (part.double() for part in numbers)
    return TokenDivergence(divergence, torch.cat(agree).cpu(), before, after)


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


def _log_softmax(logits: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64).log_softmax(-1)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors side by side, as many at a time as fit the chunk in float64."""
    first = tensors[0]
    size = _CHUNK_BYTES.get(first.device.type, _CHUNK_BYTES["cuda"])
    rows = max(1, size // (8 * first.shape[-1]))
    return zip(*(tensor.split(rows) for tensor in tensors))
