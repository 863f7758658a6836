"""A model's logits at each token, computed a few rows at a time where all of them would take too much memory.

With a vocabulary of 262,144 the logits of 2,048 tokens are 2 GB in float32, beside a model of 1 GB, and comparing two
models takes several of them. A model's hidden states before its head are a few hundred times smaller; so those are
kept, and the model's own class applies its head, soft caps and scales included, to a few rows at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UsageError

#: Bytes of logits in memory at once, in the model's dtype, by the kind of device. On a CPU just above 32 MiB:
#: glibc gives a block of more than that back as soon as it is freed; smaller ones can stay and break its heap up.
PIECE_BYTES = {"cpu": 40 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class ForwardHead:
    """A causal language model's head: its own forward pass with the body left out.

    Attributes:
        model: the whole model.
        body: the part that computes hidden states.
        output: the class of the body's output.
    """

    model: nn.Module
    body: nn.Module
    output: type

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[n, V]`` of hidden states ``[n, H]``."""
        tokens = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        output = self.output(last_hidden_state=states[None])
        with _forward_replaced(self.body, lambda *args, **kwargs: output):
            return self.model(input_ids=tokens, use_cache=False).logits[0]


@dataclass(frozen=True)
class Predictions:
    """Logits ``[..., V]``, in memory or computed from hidden states a piece at a time.

    Attributes:
        states: the logits ``[..., V]`` themselves, or hidden states ``[..., H]`` that ``head`` turns into logits.
        head: the model's head; None if ``states`` are logits.
        vocabulary: V, logits per token.
        dtype: dtype of the logits.
    """

    states: Tensor
    head: ForwardHead | None
    vocabulary: int
    dtype: torch.dtype

    @classmethod
    def of(cls, logits: Tensor | Predictions) -> Predictions:
        """Predictions from logits ``[..., V]`` in memory."""
        return logits if isinstance(logits, Predictions) else cls(logits, None, logits.shape[-1], logits.dtype)

    @classmethod
    def cat(cls, parts: Sequence[Predictions]) -> Predictions:
        """Concatenate one model's predictions as rows ``[N]``; all of them with a head, or none."""
        return replace(parts[0], states=torch.cat([part.states.flatten(0, -2) for part in parts]))

    def __getitem__(self, rows: Any) -> Predictions:
        """Some of the rows, by an index or mask of the leading dimensions."""
        return replace(self, states=self.states[rows])

    @property
    def rows(self) -> int:
        """Number of tokens with predictions, over all leading dimensions."""
        return self.states.numel() // max(1, self.states.shape[-1])

    def piece(self, start: int, stop: int) -> Tensor:
        """The logits ``[n, V]`` of rows [start, stop); ask for at most :meth:`rows_at_once`."""
        states = self.states.flatten(0, -2)[start:stop]
        return states if self.head is None else self.head(states)

    def pieces(self) -> Iterator[Tensor]:
        """The logits of all rows in order, :meth:`rows_at_once` of them at a time."""
        step = self.rows_at_once()
        return (self.piece(start, start + step) for start in range(0, self.rows, step))

    def rows_at_once(self) -> int:
        """Rows whose logits take at most :data:`PIECE_BYTES`."""
        return max(1, _piece_bytes(self.states.device) // (self.vocabulary * self.dtype.itemsize))

    def whole(self) -> Tensor:
        """All logits ``[..., V]`` at once; only for small vocabularies and texts."""
        logits = torch.cat(list(self.pieces())) if self.rows else self.states.new_empty(0, self.vocabulary)
        return logits.view(*self.states.shape[:-1], self.vocabulary)

    def argmax(self) -> Tensor:
        """The most likely token of each row, int64 ``[...]``."""
        return torch.cat([piece.argmax(-1) for piece in self.pieces()]).view(self.states.shape[:-1])


def predict(model: nn.Module, inputs: dict[str, Any], last: int | None = None) -> Predictions:
    """Run a model over tokens.

    Args:
        model: a transformers model, on one device, in evaluation mode.
        inputs: arguments of its forward pass, with ``input_ids`` int64 ``[B, S]``. An encoder-decoder's encoder and
            decoder both read these.
        last: number of positions at the end of each row to return; all when None.

    Returns:
        Predictions ``[B, S or last]``. For a model without a language head, its hidden states stand in for logits.

    Raises:
        UsageError: the model returns neither logits nor hidden states of tokens.
    """
    return predict_step(model, {"use_cache": False, **inputs}, last)[0]


@torch.no_grad()
def predict_step(
    model: nn.Module, inputs: dict[str, Any], last: int | None = None, rows: int | None = None
) -> tuple[Predictions, Any]:
    """(predictions, the model's output); the output has the cache, but perhaps logits of one token only.

    Args:
        model, inputs, last: as for :func:`predict`.
        rows: total tokens of all steps whose predictions :meth:`Predictions.cat` will join, if more than this step's.
    """
    tokens: Tensor = inputs["input_ids"]
    last = tokens.shape[1] if last is None else last
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs = {**inputs, "decoder_input_ids": tokens}
    body = _body_of(model)
    if body is not None and _is_large(model, rows or tokens.shape[0] * last):
        with _body_shortened(body) as kept:
            out = model(**inputs)
        logits = getattr(out, "logits", None)
        same_batch = bool(kept) and len(kept[0].last_hidden_state) == len(tokens)
        if same_batch and isinstance(logits, Tensor) and logits.shape[:-1] == (len(tokens), 1):
            # Virtual tokens (prompt tuning) come before those of the text.
            head = ForwardHead(model, body, type(kept[0]))
            return Predictions(kept[0].last_hidden_state[:, -last:], head, logits.shape[-1], logits.dtype), out
        if kept:
            out = model(**inputs)
    elif last < tokens.shape[1] and keeps_logits(model):
        # No head for the positions that only serve as context.
        out = model(**inputs, logits_to_keep=last)
    else:
        out = model(**inputs)
    logits = getattr(out, "logits", None)
    if logits is None:
        logits = getattr(out, "last_hidden_state", None)
    if not isinstance(logits, Tensor) or logits.ndim < 3:
        # The head gives one result per sequence (a classifier); a comparison needs one row per token.
        hidden = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
        if not hidden:
            raise UsageError(f"{type(model).__name__} returns no logits or hidden states of tokens; prove a causal LM")
        logits = hidden[-1]
    return Predictions.of(logits[:, -last:]), out


#: Tokens of a batch, by the kind of device.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def batch_size(model: Any, length: int, batch_tokens: int | None = None) -> int:
    """Texts in a batch: as many as keep the device busy.

    Args:
        model: a transformers causal language model.
        length: tokens of a text.
        batch_tokens: tokens in a batch; by the kind of device when None.
    """
    kind = next(model.parameters()).device.type
    return max(1, (batch_tokens or _BATCH_TOKENS.get(kind, _BATCH_TOKENS["cuda"])) // length)


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model's forward pass takes ``logits_to_keep``."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def vocabulary(model: Any) -> int:
    """A model's vocabulary size; 0 where its config does not say."""
    return int(getattr(model.config.get_text_config(decoder=True), "vocab_size", 0) or 0)


def _piece_bytes(device: torch.device) -> int:
    return PIECE_BYTES.get(device.type, PIECE_BYTES["cuda"])


def _is_large(model: nn.Module, rows: int) -> bool:
    """Whether the logits of ``rows`` tokens take more than one piece."""
    parameter = next(model.parameters(), None)
    if parameter is None or getattr(model, "config", None) is None:
        return False
    return rows * vocabulary(model) * parameter.element_size() > _piece_bytes(parameter.device)


def _body_of(model: nn.Module) -> Any:
    """The part of a causal language model that computes hidden states; None if it cannot be told from the head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    find = getattr(model, "get_decoder", None)
    for body in (find() if callable(find) else None, *(getattr(model, name, None) for name in ("base_model", "model"))):
        # Some classes call their head the decoder.
        if isinstance(body, nn.Module) and body is not model and not isinstance(body, nn.Linear):
            return body
    return None


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace one module's forward method inside the block."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def _body_shortened(body: nn.Module) -> Iterator[list[Any]]:
    """Give a list that collects the body's outputs, while the head sees the last position only of [B, S, H]."""
    forward, kept = body.forward, []

    def shortened(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        hidden = getattr(out, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            return out
        kept.append(out)
        return type(out)(**{**out, "last_hidden_state": hidden[:, -1:]})

    with _forward_replaced(body, shortened):
        yield kept
