"""An attention mask as a few numbers instead of a ``[B, 1, Sq, Skv]`` tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rehead.attention.blocks import KeyBlocks
from rehead.attention.kernels.reference import visible
from rehead.errors import UnsupportedError

RULES = (
    "causal", "q_offset", "window", "sink_tokens", "chunk", "key_mask", "kv_start", "kv_end", "q_segments",
    "kv_segments", "blocks"
)  # fmt: skip
"""The rules of a call that a mask may set."""


@dataclass(eq=False)
class TiledMask:
    """Which keys each query row may see, in O(batch x length) memory at most.

    transformers passes this object unchanged from the mask function to every attention layer. It supports what models
    and ``generate`` do with a mask (rank, shape, slices, device moves) and refuses arithmetic, because a model that
    adds the mask to its own scores is not using the patched attention.

    Attributes:
        batch_size, q_length, kv_length: the extents.
        device: where the tensors live.
        causal: row ``i`` sees key ``j`` only if ``j <= i + q_offset``.
        q_offset: position of the first row on the keys' axis, an int or a tensor of one element.
        window: row sees key only if ``i + q_offset - j < window``.
        sink_tokens: first tokens of a sequence that are seen from beyond the window too.
        chunk: row sees key only if ``(i + q_offset) // chunk == j // chunk``.
        key_mask: bool ``[B, Skv]``, False hides a key.
        kv_start, kv_end: int32 ``[B]`` bounds of what ``key_mask`` leaves visible.
        q_segments, kv_segments: int32 ``[B, Sq]`` and ``[B, Skv]``; a row sees keys of its own segment only.
        blocks: for each block of rows the blocks of keys that it may see.
        dense: bool ``[B|1, H|1, Sq, Skv]`` for a mask that the other fields cannot describe; they are then not set.
        rank: the value of ``ndim``; 4, except for the few models that would rebuild a 4-D mask.
    """

    batch_size: int
    q_length: int
    kv_length: int
    device: torch.device
    causal: bool = True
    q_offset: int | Tensor = 0
    window: int | None = None
    sink_tokens: int = 0
    chunk: int | None = None
    key_mask: Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    blocks: KeyBlocks | None = None
    dense: Tensor | None = None
    rank: int = 4

    # The tensor methods that models and `generate` call on a mask.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch_size, 1, self.q_length, self.kv_length))

    @property
    def ndim(self) -> int:
        return self.rank

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return self.rank

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, *args: Any, **kwargs: Any) -> TiledMask:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> TiledMask:
        return self

    def detach(self) -> TiledMask:
        return self

    def bool(self) -> TiledMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> TiledMask:
        """Move to a device; a dtype is ignored, since there are no values to cast."""
        device = kwargs.get("device")
        for arg in args:
            if isinstance(arg, (str, int, torch.device)) and not isinstance(arg, bool):
                device = arg
            elif isinstance(arg, Tensor):
                device = arg.device
        if device is None or torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        if self.blocks is not None:
            moved["blocks"] = self.blocks.to(device)
        return replace(self, device=torch.device(device), **moved)

    def __getitem__(self, index: Any) -> TiledMask:
        """Crop: ``mask[:, :, :, :n]`` keeps the first n keys, ``mask[:, :, -n:, :]`` the last n rows."""
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [i for i in items if i is Ellipsis]:
            place = next(i for i, item in enumerate(items) if item is Ellipsis)
            items = items[:place] + (slice(None),) * (5 - len(items)) + items[place + 1 :]
        items += (slice(None),) * (4 - len(items))
        extents = self.shape
        if len(items) != 4 or not all(isinstance(i, slice) and i.step in (None, 1) for i in items):
            raise self._refusal(f"indexing with {index!r}")
        starts, stops = zip(*(i.indices(n)[:2] for i, n in zip(items, extents, strict=True)), strict=True)
        if starts[0] != 0 or stops[0] != extents[0] or starts[1] != 0 or starts[3] != 0:
            raise self._refusal(f"indexing with {index!r}")
        return self._crop(starts[2], stops[2], stops[3])

    def _crop(self, q_start: int, q_stop: int, kv_stop: int) -> TiledMask:
        if (q_start, q_stop, kv_stop) == (0, self.q_length, self.kv_length):
            return self
        rows, keys = slice(q_start, q_stop), slice(0, kv_stop)
        return replace(
            self,
            q_length=q_stop - q_start,
            kv_length=kv_stop,
            q_offset=self.q_offset + q_start,
            key_mask=None if self.key_mask is None else self.key_mask[:, keys],
            kv_end=None if self.kv_end is None else self.kv_end.clamp(max=kv_stop),
            q_segments=None if self.q_segments is None else self.q_segments[:, rows],
            kv_segments=None if self.kv_segments is None else self.kv_segments[:, keys],
            blocks=None if self.blocks is None else self.blocks.cropped(q_start, q_stop),
            dense=None if self.dense is None else self.dense[:, :, rows, keys],
        )

    # For the attention function.

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are set, by name."""
        names = ("key_mask", "kv_start", "kv_end", "q_segments", "kv_segments", "dense", "q_offset")
        return {name: getattr(self, name) for name in names if isinstance(getattr(self, name), Tensor)}

    def rules(self) -> dict[str, Any]:
        """The fields of an :class:`~rehead.attention.call.AttentionCall` equivalent to this mask."""
        if self.dense is not None:
            return {"causal": False, "bias": self.dense}
        return {name: getattr(self, name) for name in RULES}

    def with_window(self, window: int | None) -> TiledMask:
        """A copy with a window, or a narrower one."""
        if window is None:
            return self
        if self.dense is not None:
            raise UnsupportedError(
                "a window cannot be added to a mask that has no short description; drop the window option"
            )
        return replace(self, window=window if self.window is None else min(window, self.window))

    def with_segments(self, q_segments: Tensor, kv_segments: Tensor) -> TiledMask:
        """A copy in which a row also sees keys of its own segment only (int ``[B, Sq]``, ``[B, Skv]``)."""
        if self.q_segments is not None and self.kv_segments is not None:
            base = max(self.q_length, self.kv_length) + 1
            q_segments = self.q_segments * base + q_segments
            kv_segments = self.kv_segments * base + kv_segments
        return replace(self, q_segments=q_segments.to(torch.int32), kv_segments=kv_segments.to(torch.int32))

    def materialize(self) -> Tensor:
        """The mask as a bool tensor ``[B, 1, Sq, Skv]``: takes quadratic memory."""
        if self.dense is not None:
            return self.dense.expand(self.batch_size, -1, -1, -1)
        seen = visible(self.q_length, self.kv_length, self.device, **self.rules())
        return seen.expand(self.batch_size, -1, -1, -1)

    # Everything else would read the mask as a tensor.

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"this model reads its attention mask itself ({what}), so it does not use the attention that rehead_tiled "
            "provides; load it with attn_implementation='eager', or, if it was loaded by name, try "
            "rehead.patches.patch_model(model, 'tiled') (with gradient checkpointing, backward() comes before revert())"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mask = next(_masks(args), None) or next(_masks(tuple((kwargs or {}).values())))
        raise mask._refusal(f"torch function {getattr(func, '__name__', func)}")

    def _arithmetic(self, *other: Any) -> Any:
        raise self._refusal("arithmetic on it")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _arithmetic
    __invert__ = __lt__ = __gt__ = __le__ = __ge__ = __neg__ = __truediv__ = _arithmetic

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal(f"attribute {name!r}")


def _masks(values: Any) -> Any:
    for value in values:
        if isinstance(value, TiledMask):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _masks(value)
