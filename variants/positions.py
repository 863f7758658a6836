"""What variants share that give queries and keys other positions than the model rotated them for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.counts import Length
from rehead.errors import UnsupportedError
from rehead.models.positions import position_limit
from rehead.models.rotation import Turn, turn_of
from rehead.variants.contract import VariantOptions

if TYPE_CHECKING:
    from rehead.models.undo import UndoLog
    from rehead.variants.stack import LiveVariant


class PositionOptions(VariantOptions):
    """Options of variants that change positions."""

    trained: Length | None = Field(
        None, ge=2, description="Tokens that the model was trained to read; max_position_embeddings by default."
    )


@dataclass(frozen=True, eq=False)
class Placed:
    """Options with what they mean in one layer; plain, so that compiled models read it.

    Attributes:
        options: of the variant.
        length: tokens that the model was trained to read.
        turn: the layer's rotary pairs; None for a layer that does not rotate.
    """

    options: Any
    length: int
    turn: Turn | None


def attach(live: LiveVariant, undo: UndoLog) -> None:
    """Tell each layer its rotary pairs and the length that the model was trained at.

    Raises:
        UnsupportedError: how heads rotate is not known, or it changes with the length.
    """
    model: Any = live.model
    config = model.config.get_text_config(decoder=True)
    if (limit := getattr(live.options, "trained", None) or position_limit(model)) is None:
        raise UnsupportedError(f"{config.model_type}: its config does not say how long its texts were; give trained=N")
    turns = {state.name: None if state.index is None else turn_of(config, state.index) for state in live.states}
    alike: dict[Any, Turn] = {}  # layers that turn alike share what a turn remembers
    for state in live.states:
        turn = turns[state.name]
        shared = turn and alike.setdefault((turn.interleaved, *turn.angles.tolist()), turn)
        state.options = Placed(live.options, limit, shared)
    if not alike:
        raise UnsupportedError(
            f"{config.model_type}: its heads do not rotate, so no positions can be changed; see the variant context"
        )


def changes(call: AttentionCall, placed: Placed) -> bool:
    """Whether a call reaches beyond the trained length in a layer that rotates.

    Raises:
        UnsupportedError: it does, under rules that changed positions do not go together with.
    """
    if placed.turn is None or not call.causal or call.key.shape[2] <= placed.length:
        return False
    if call.window is not None and call.window <= placed.length:
        return False
    extra = (call.chunk, call.q_segments, call.bias, call.alibi_slopes, call.blocks, call.window, call.key_tail)
    if any(rule is not None for rule in extra):
        raise UnsupportedError(
            "changed positions go together with causal and padding masks only; leave packed texts, 4-D masks, biases, "
            "latents and windows longer than the trained length out"
        )
    return True


def by_text(call: AttentionCall, compute: Callable[[AttentionCall], Tensor]) -> Tensor:
    """Attention of a call whose texts may begin at different places, each computed as if it began at 0.

    Args:
        compute: attention of texts that all begin at key 0, ``[B, Sq, H, Dv]``.
    """
    if call.kv_start is None and call.kv_end is None:
        return compute(call)
    batch, rows, count = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    start = [0] * batch if call.kv_start is None else call.kv_start.tolist()
    end = [count] * batch if call.kv_end is None else torch.as_tensor(call.kv_end).expand(batch).tolist()
    out = call.value.new_zeros((batch, rows, call.query.shape[1], call.value.shape[-1]), dtype=call.query.dtype)
    parts = []
    for row, (first, last) in enumerate(zip(start, end)):
        skipped = max(0, first - call.offset)  # rows of padding before the text
        if skipped >= rows or last <= first:
            parts.append(out[row : row + 1])
            continue
        keys, mask = slice(first, last), call.key_mask
        own = call.with_(
            query=call.query[row : row + 1, :, skipped:],
            key=call.key[row : row + 1, :, keys],
            value=call.value[row : row + 1, :, keys],
            key_mask=None if mask is None else mask[row : row + 1, keys],
            kv_start=None,
            kv_end=None,
            q_offset=call.offset + skipped - first,
        )
        parts.append(torch.cat([out[row : row + 1, :skipped], compute(own)], 1))
    return torch.cat(parts)


def keys_of(call: AttentionCall, first: int, last: int) -> dict[str, Any]:
    """The fields of a call that name keys, for the keys [first, last)."""
    return {
        "key": call.key[:, :, first:last],
        "value": call.value[:, :, first:last],
        "key_mask": None if call.key_mask is None else call.key_mask[:, first:last],
    }
