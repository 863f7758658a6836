"""The mask function that transformers calls under ``rehead_tiled``: it returns a :class:`TiledMask`.

transformers describes every mask as a composition of small closures (causal, window, chunk, padding, packing). They are
read here by name and free variables; unknown ones are evaluated as a dense mask, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from rehead.attention.discover import MaskStyle, mask_style
from rehead.attention.mask import TiledMask
from rehead.errors import UnsupportedError

logger = logging.getLogger("rehead.patches")

SYNC_ROWS = 16
"""Masks for more query rows than this (a prefill, a training step) may wait for the GPU once; decode steps may not."""

_said: set[str] = set()


def say_once(key: str, message: str) -> None:
    """Log a warning the first time that ``key`` is used."""
    if key not in _said:
        _said.add(key)
        logger.warning(message)


def _say_dense(config: Any, reason: str) -> None:
    model = getattr(config, "model_type", "this model")
    say_once(
        f"{model}: {reason}",
        f"rehead_tiled: {model} gets a dense mask ({reason}), which takes batch x query length x key length elements",
    )


@dataclass
class _Closures:
    """The rules in the closures of one mask, in absolute positions."""

    causal: bool = False
    windows: list[int] = field(default_factory=list)
    chunks: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    padding: list[Tensor] = field(default_factory=list)


def _free(function: Callable) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _read(function: Callable, rules: _Closures, positions: Tensor | None = None) -> bool:
    """Add the rules of a closure to ``rules``; False if the closure is not known."""
    if function is masking_utils.bidirectional_mask_function:
        return True
    if function is masking_utils.causal_mask_function:
        rules.causal = True
        return True
    if getattr(function, "__module__", None) != masking_utils.__name__ or not hasattr(function, "__code__"):
        return False
    maker = function.__qualname__.split(".", 1)[0]
    free = _free(function)
    if maker == "and_masks":
        return all(_read(part, rules, positions) for part in free["mask_functions"])
    if maker == "sliding_window_overlay":
        rules.windows.append(int(free["sliding_window"]))
    elif maker == "chunked_overlay":
        rules.chunks.append((int(free["chunk_size"]), free["left_padding"], positions))
    elif maker == "packed_sequence_mask_function":
        rules.packed.append(free["packed_sequence_mask"])
    elif maker == "padding_mask_function":
        rules.padding.append(free["padding_mask"])
    elif maker == "remap_positions_for_packed_sequence":
        # Positions restart in every packed sequence and rise by one inside it. Causality and windows compare two
        # positions of one sequence, so only chunks depend on where the count starts.
        return _read(free["mask_function"], rules, free["position_ids"])
    else:
        return False
    return True


def _may_wait(tensor: Tensor, q_length: int) -> bool:
    """Whether a tensor's values may be read: never in a compiled graph, and not in every decode step on a GPU."""
    return not torch.compiler.is_compiling() and not (tensor.is_cuda and q_length <= SYNC_ROWS)


def _pad_to(mask: Tensor, start: int, length: int) -> Tensor:
    """``mask[:, start : start + length]``, with keys beyond its end hidden."""
    short = start + length - mask.shape[-1]
    if short > 0:
        mask = torch.nn.functional.pad(mask, (0, short), value=False)
    return mask[:, start : start + length]


def _add_padding(mask: TiledMask, padding: Tensor) -> TiledMask:
    """Add padding, bool ``[B, Skv]``: as bounds alone if it has no holes and may be read, else with the mask too."""
    # transformers uses the first rows of a mask; models with several codebooks may pass more.
    padding = padding[: mask.batch_size]
    if not padding.shape[-1]:
        return mask  # no keys, none of them padding
    position = torch.arange(mask.kv_length, device=padding.device, dtype=torch.int32)
    mask.kv_start = torch.where(padding, position, mask.kv_length).amin(-1).to(torch.int32)
    mask.kv_end = torch.where(padding, position + 1, 0).amax(-1).to(torch.int32)
    mask.key_mask = padding
    if not _may_wait(padding, mask.q_length):
        return mask
    solid = (mask.kv_end - mask.kv_start).clamp(min=0) == padding.sum(-1)
    if bool(solid.all()):
        mask.key_mask = None
        if bool(padding.all()):
            mask.kv_start = mask.kv_end = None
    return mask


def _add_chunk(
    mask: TiledMask, size: int, left_padding: Tensor, positions: Tensor | None, q_start: int | Tensor, kv_start: int
) -> TiledMask:
    """Add chunks: as a number if they start at position 0 of every row, else as segments."""
    aligned = positions is None and kv_start % size == 0
    if aligned and _may_wait(left_padding, mask.q_length) and not bool(left_padding.any()):
        mask.chunk = size if mask.chunk is None else min(size, mask.chunk)
        return mask
    device = left_padding.device
    left_padding = left_padding[: mask.batch_size]
    rows = torch.arange(mask.q_length, device=device)[None, :] + q_start if positions is None else positions
    keys = torch.arange(mask.kv_length, device=device)[None, :] + kv_start if positions is None else positions
    shift = left_padding[:, None]
    q_segments, kv_segments = (
        torch.div(x - shift, size, rounding_mode="floor").expand(mask.batch_size, -1) for x in (rows, keys)
    )
    return mask.with_segments(q_segments, kv_segments)


def _snapshot(offset: int | Tensor, q_length: int) -> int | Tensor:
    """The value of an offset, since a static cache passes its own counter and changes it before attention runs."""
    if not isinstance(offset, Tensor):
        return offset
    return int(offset) if _may_wait(offset, q_length) else offset.clone()


def _describe(mask: TiledMask, function: Callable, padding: Tensor | None, kv_offset: int) -> TiledMask | None:
    """Fill in ``mask`` from the closures, or return None where they are not known."""
    rules = _Closures()
    if not _read(function, rules):
        return None
    q_start = mask.q_offset + kv_offset
    mask.causal = rules.causal
    mask.window = min(rules.windows) if rules.windows else None
    for packed in rules.packed:
        # A compiled forward pass cannot read values and always gets positions; one sequence per row needs no segments.
        if _may_wait(packed, mask.q_length) and not bool((packed != packed[:, :1]).any()):
            continue
        mask = mask.with_segments(packed, packed)
    for size, left_padding, positions in rules.chunks:
        mask = _add_chunk(mask, size, left_padding, positions, q_start, kv_offset)
    for extra in rules.padding:
        extra = _pad_to(extra, kv_offset, mask.kv_length)
        padding = extra if padding is None else padding & extra
    return mask if padding is None else _add_padding(mask, padding)


def tiled_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | TiledMask | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> TiledMask | Tensor:
    """The mask function that is registered with transformers' ``AttentionMaskInterface`` as ``rehead_tiled``.

    Args:
        batch_size, q_length, kv_length: extents of the mask.
        q_offset, kv_offset: position of the first query and of the first key.
        mask_function: transformers' closure over (batch, head, query, key) indices.
        attention_mask: 2-D padding ``[B, at most kv_offset + kv_length]``, True for tokens; or a descriptor made
            earlier for this forward pass, which is returned unchanged.
        device: the device for index tensors.
        use_vmap: the closure is not written for broadcasting (passed on to the dense fallback).
        config: the model's config.
        **kwargs: hints for other implementations (``local_size``, ``allow_is_causal_skip``, ``dtype``).

    Returns:
        A :class:`TiledMask`, or, for the few models whose layers compute with the mask, eager's float mask.

    Raises:
        UnsupportedError: a prepared descriptor of another shape.
    """
    if isinstance(attention_mask, TiledMask):
        if attention_mask.q_length != q_length:
            raise UnsupportedError(
                f"a mask prepared for {attention_mask.q_length} query tokens was passed with {q_length}; "
                "pass the 2-D attention mask instead"
            )
        return attention_mask
    # The most common mask can be made inside a compiled graph.
    if (
        torch.compiler.is_compiling()
        and mask_function is masking_utils.causal_mask_function
        and _passes_it_on(type(config))
    ):
        return _causal(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    return _make(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, use_vmap, config
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _passes_it_on(config_class: type) -> bool:
    """Whether models of a config class pass their mask to attention unchanged; a constant in compiled graphs."""
    return mask_style(config_class) is MaskStyle.PASSED


def _causal(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> TiledMask:
    """A causal mask, perhaps with padding."""
    mask = TiledMask(
        batch_size, q_length, kv_length, torch.device(device), q_offset=_snapshot(q_offset, q_length) - kv_offset
    )
    return mask if attention_mask is None else _add_padding(mask, _pad_to(attention_mask.bool(), kv_offset, kv_length))


@torch.compiler.disable
def _make(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    device: torch.device | str,
    use_vmap: bool,
    config: Any,
) -> TiledMask | Tensor:
    """:func:`tiled_mask` outside compiled graphs, which cannot read closures."""
    dense_arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": False,
        "use_vmap": use_vmap,
        "device": device,
    }
    style = mask_style(type(config))  # type: ignore[arg-type]
    if style is MaskStyle.READ:
        # The layers choose keys by arithmetic on the mask, so they get the one that eager attention would give them.
        _say_dense(config, "its layers read the mask")
        dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
        return masking_utils.eager_mask(**dense_arguments, dtype=dtype)
    if style is MaskStyle.PASSED and mask_function is masking_utils.causal_mask_function:
        return _causal(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
    mask = TiledMask(
        batch_size, q_length, kv_length, torch.device(device), q_offset=_snapshot(q_offset, q_length) - kv_offset
    )
    if style is MaskStyle.TAKEN_APART:
        mask.rank = 0
    padding = None if attention_mask is None else _pad_to(attention_mask.bool(), kv_offset, kv_length)
    if mask_function is masking_utils.causal_mask_function:
        return mask if padding is None else _add_padding(mask, padding)
    described = _describe(mask, mask_function, padding, kv_offset)
    if described is not None:
        return described
    _say_dense(config, f"no short description of {getattr(mask_function, '__qualname__', mask_function)}")
    dense = masking_utils.sdpa_mask(**dense_arguments, allow_is_causal_skip=False)
    return TiledMask(batch_size, q_length, kv_length, torch.device(device), causal=False, dense=dense, rank=mask.rank)
