"""A cache that keeps the last tokens of a window and the first tokens of each text, its sinks, and drops the rest.

The file travels beside a checkpoint that needs it; live models under the variant ``window`` use the same classes. Keys
are stored as they were rotated, so positions stay those of the text; :attr:`WindowLayer.shift` says which position each
kept key has. The sinks are those of Xiao et al. 2023 (arXiv 2309.17453).
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class WindowLayer(DynamicLayer):
    """Keys and values of one layer: the first ``sinks`` tokens of each text, then the last ``window - 1``.

    Args:
        window: tokens that a query sees, its own included.
        sinks: first tokens of a text that stay.

    Attributes:
        seen: tokens read so far, as :meth:`get_seq_length` says.
        shift: of the keys that :meth:`update` returned last, those after the sinks stand ``shift`` places before their
            positions; 0 while nothing was dropped.
        starts: int64 ``[B]``, how many tokens of padding come before each text, or None; set before the first update.
        waits: whether a text may begin later, so that its start is to be noted again.
    """

    is_sliding = False  # masks are made for the whole text, and cut to what is kept by :meth:`positions`

    def __init__(self, window: int, sinks: int = 0, **kwargs: Any) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.keys: Any
        self.values: Any
        self.seen = self.shift = self._dropped = 0
        self.starts: torch.Tensor | None = None
        self.waits = False
        self.record_past = False

    def begin(self, starts: torch.Tensor | None) -> None:
        """Note where the texts begin, of those that had not begun when that was noted last."""
        if starts is not None and self.starts is not None:
            starts = torch.where(self.starts >= self.seen, starts.to(self.starts.device), self.starts)
        self.starts = starts
        self.waits = starts is not None and bool((starts > self.seen).any())

    @property
    def kept(self) -> int:
        """Tokens that are kept of a long text."""
        return self.window - 1 + self.sinks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; returns what is kept and the new ones, ``[B, K, kept + new, D]``, for :meth:`positions`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.seen += key_states.shape[-2]
        self.shift = self._dropped
        self.keys, self.values = keys, values
        if not self.record_past:
            self._trim()
        return keys, values

    def _trim(self) -> None:
        """Drop what no later token sees."""
        count = self.keys.shape[-2]
        if count <= self.kept:
            return
        first = self.seen - (self.window - 1)  # position of the window's first token
        old, self._dropped = self._dropped, first - self.sinks
        slots = self._slots(old, count)
        self._keep(*(self._trimmed(states, slots, count) for states in (self.keys, self.values)))

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def _slots(self, old: int, count: int) -> torch.Tensor | None:
        """Where the sinks stand among the present keys, int64 ``[B, sinks]``; None for the first ones."""
        if self.starts is None or not self.sinks:
            return None
        place = torch.arange(self.sinks, device=self.keys.device)
        begins = self.starts.to(place.device)
        wanted = begins.clamp(max=self._dropped)[:, None] + place
        had = begins.clamp(max=old)[:, None]  # the position of the first slot before
        return torch.where(wanted < had + self.sinks, wanted - had, wanted - old).clamp(0, count - 1)

    def _trimmed(self, states: torch.Tensor, slots: torch.Tensor | None, count: int) -> torch.Tensor:
        recent = states[:, :, count - (self.window - 1) :]
        if slots is None:
            first = states[:, :, : self.sinks]
        else:
            first = states.gather(2, slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
        return torch.cat([first, recent], dim=-2)

    def positions(self, count: int, device: torch.device) -> torch.Tensor:
        """The position of each of the ``count`` keys that :meth:`update` returned, int64 ``[B or 1, count]``."""
        place = torch.arange(count, device=device)[None]
        if not self.shift:
            return place
        begins = torch.zeros(1, dtype=torch.int64) if self.starts is None else self.starts.clamp(max=self.shift)
        return torch.where(place < self.sinks, place + begins.to(device)[:, None], place + self.shift)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a cache that keeps everything."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self.seen

    def activate_past_recording(self) -> None:
        """Keep what an update would drop until :meth:`crop`, so that drafted tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, and drop what no later token sees.

        Raises:
            RuntimeError: tokens that would be seen again were dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to take back, negative")
        if not self.is_initialized:
            return
        count = -tokens_to_remove
        if count and self._dropped and not self.record_past:
            raise RuntimeError(
                f"the cache keeps a window of {self.window} tokens and has dropped those before it, so it cannot be "
                "cropped; call activate_past_recording() before the tokens that may be taken back, or decode without "
                "an assistant"
            )
        if count:
            self.keys, self.values = (states[:, :, : states.shape[2] - count] for states in (self.keys, self.values))
            self.seen -= count
        self._trim()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = self.shift = self._dropped = 0
        self.starts, self.waits = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the texts of other beams."""
        if self.is_initialized:
            self.keys, self.values = (states[beam_idx.to(states.device)] for states in (self.keys, self.values))
        if self.starts is not None:
            self.starts = self.starts[beam_idx.to(self.starts.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text."""
        super().batch_repeat_interleave(repeats)
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the texts."""
        super().batch_select_indices(indices)
        if self.starts is not None:
            self.starts = self.starts[indices.to(self.starts.device)]


class StaticWindowLayer(WindowLayer):
    """The same in two buffers that are made once, beside static layers.

    Args:
        length: positions that the static cache was made for.
    """

    def __init__(self, window: int, sinks: int, length: int, **kwargs: Any) -> None:
        super().__init__(window, sinks)
        self.length = length
        self._buffers: tuple[torch.Tensor, ...] = ()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As static layers have them: the whole length."""
        return self.length, 0

    def get_max_length(self) -> int:
        """Positions that the cache was made for."""
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`WindowLayer.update`."""
        if not self._buffers:
            size = min(self.kept, self.length)
            self._buffers = tuple(x.new_zeros(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states))
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            self._keep(self.keys, self.values)
        return keys, values

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        count = keys.shape[2]
        if not self._buffers or self._buffers[0].shape[0] != keys.shape[0] or count > self._buffers[0].shape[2]:
            self.keys, self.values = keys, values
            return
        for buffer, states in zip(self._buffers, (keys, values)):
            if states.data_ptr() != buffer.data_ptr():
                buffer[:, :, :count] = states
        self.keys, self.values = (buffer[:, :, :count] for buffer in self._buffers)


def starts_of(mask: Any) -> torch.Tensor | None:
    """How many tokens of padding come before each text, all so far of one not begun: int64 ``[B]``; None without any.

    Args:
        mask: a model's ``attention_mask``: int or bool ``[B, S]``, bool ``[B, 1, Sq, S]``, one for each kind of layer,
            Rehead's description of one, or None.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if isinstance(mask, torch.Tensor):
        rows = mask if mask.ndim == 2 else mask[:, 0, -1] if mask.ndim == 4 else None
        rows = None if rows is None or rows.is_floating_point() else rows != 0
        starts = None if rows is None else torch.where(rows.any(-1), rows.int().argmax(-1), rows.shape[-1])
    else:
        starts = getattr(mask, "kv_start", None)
    return starts.long() if starts is not None and bool((starts > 0).any()) else None


def use_windows(cache: Cache, windows: Iterable[tuple[int, int, int]], mask: Any = None) -> None:
    """Put window layers into a cache, where it has plain layers; what these hold is taken over.

    Args:
        cache: what a model is called with.
        windows: (layer's index in the cache, window, sinks) of every layer with a window.
        mask: the mask of the call, to tell where each text begins; see :func:`starts_of`.
    """
    fresh = not (len(cache.layers) and cache.get_seq_length())
    waiting = any(isinstance(layer, WindowLayer) and layer.waits for layer in cache.layers)
    starts = starts_of(mask) if fresh or waiting else None
    for index, window, sinks in windows:
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        if index >= len(cache.layers):
            continue
        layer: Any = cache.layers[index]
        if isinstance(layer, WindowLayer):
            if layer.waits or (layer.starts is None and not layer.seen):
                layer.begin(starts)
            continue
        made: WindowLayer
        if type(layer) is StaticLayer:
            made = StaticWindowLayer(window, sinks, layer.max_cache_len)
        elif type(layer) is DynamicLayer:
            made = WindowLayer(window, sinks)
        else:
            continue
        made.begin(starts)
        cache.layers[index] = made
        count = int(layer.get_seq_length()) if layer.is_initialized else 0
        if count:
            made.update(layer.keys[:, :, :count], layer.values[:, :, :count])
