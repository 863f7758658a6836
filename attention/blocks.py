"""Any mask in blocks: for each block of query rows, the blocks of keys that it may see, as compressed sparse rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rehead.errors import UsageError

SMALLEST = 16
"""The smallest block; the kernels' tiles must fit into one."""


@dataclass(frozen=True, eq=False)
class KeyBlocks:
    """Which blocks of keys each block of query rows may see; every other rule of a call applies as well.

    Row i of a call belongs to row block ``i // rows`` (the first row of the call is row 0 whatever its position), key j
    to key block ``j // keys``. Row block r of head h in batch row b may see the key blocks
    ``index[starts[b, h, r] : starts[b, h, r + 1]]``. A row whose list is empty sees no key, and its output is 0.

    The class trusts its values, since reading them from a GPU takes time; :meth:`checked` makes one that is checked.

    Attributes:
        starts: int32 ``[B or 1, H or 1, row blocks + 1]``; the lists lie in ``index`` one behind the other.
        index: int32 ``[entries]``, ascending in each list.
        rows, keys: rows and keys per block, powers of two from 16; 128 is what the fastest kernels take.
    """

    starts: Tensor
    index: Tensor
    rows: int = 128
    keys: int = 128

    @classmethod
    def checked(
        cls,
        starts: Tensor,
        index: Tensor,
        num_q: int,
        num_k: int,
        *,
        rows: int = 128,
        keys: int = 128,
        causal_from: int | None = None,
    ) -> KeyBlocks:
        """The record for ``num_q`` rows and ``num_k`` keys, once its values are known to be right.

        Args:
            starts, index, rows, keys: as the attributes.
            causal_from: position of the first row, for lists that claim to be causal: a list may then not name a block
                that lies behind all rows of its row block. None claims nothing.

        Raises:
            UsageError: a size that is not a power of two, tensors of another shape or dtype, lists that overlap, key
                blocks out of range, not ascending, or not causal.
        """
        blocks = cls(starts, index, rows, keys)
        blocks.check_shape(num_q, num_k)
        flat, counts = starts.reshape(-1).long(), starts[..., 1:] - starts[..., :-1]
        if (
            bool((counts < 0).any())
            or int(flat[0]) != 0
            or int(flat[-1]) > index.numel()
            or bool((starts[..., 0].reshape(-1)[1:] != starts[..., -1].reshape(-1)[:-1]).any())
        ):
            raise UsageError(
                f"block starts must rise from 0 to at most {index.numel()}, the length of the index, each head's lists "
                "right behind those of the head before; build them with KeyBlocks.of"
            )
        used, owner = index[: int(flat[-1])].long(), blocks.owners()[: int(flat[-1])]
        count = -(-num_k // keys)
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= count):
            wrong = used[(used < 0) | (used >= count)][0]
            raise UsageError(f"key block {int(wrong)} is out of range: {num_k} keys have {count} blocks of {keys}")
        if bool(((owner[1:] == owner[:-1]) & (used[1:] <= used[:-1])).any()):
            raise UsageError("the key blocks of a list are not in ascending order; sort each list, without repeats")
        if causal_from is not None:
            block = owner % (starts.shape[-1] - 1)
            last = ((block + 1) * rows).clamp(max=num_q) - 1 + causal_from
            late = used * keys > last
            if bool(late.any()):
                raise UsageError(
                    f"the blocks are said to be causal, but row block {int(block[late][0])} names key block "
                    f"{int(used[late][0])}, which begins after its last row; leave it out or drop the claim"
                )
        return blocks

    @classmethod
    def of(cls, seen: Tensor, rows: int = 128, keys: int = 128) -> KeyBlocks:
        """The record from a bool tensor ``[B or 1, H or 1, row blocks, key blocks]``, True where a block is seen."""
        column = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device)
        return cls(starts_of(seen.sum(-1)), column.expand_as(seen).masked_select(seen), rows, keys)

    def check_shape(self, num_q: int, num_k: int) -> None:
        """Raise :class:`UsageError` unless the tensors describe ``num_q`` rows; reads no values."""
        for name, size in (("rows", self.rows), ("keys", self.keys)):
            if size < SMALLEST or size & (size - 1):
                raise UsageError(f"blocks have {size} {name}; give a power of two from {SMALLEST}")
        for name, tensor, rank in (("starts", self.starts, 3), ("index", self.index, 1)):
            if tensor.ndim != rank or tensor.dtype not in (torch.int32, torch.int64):
                raise UsageError(
                    f"block {name} have {tensor.ndim} dimensions of {tensor.dtype}; give int32, {rank} dimensions"
                )
        want = -(-num_q // self.rows) + 1
        if self.starts.shape[-1] != want:
            raise UsageError(
                f"block starts have {self.starts.shape[-1]} entries for each head; {num_q} rows in blocks of "
                f"{self.rows} have {want}"
            )

    def to(self, device: torch.device | str) -> KeyBlocks:
        """The record on another device."""
        return replace(self, starts=self.starts.to(device), index=self.index.to(device))

    def cropped(self, first: int, stop: int) -> KeyBlocks:
        """The record of the rows ``[first, stop)``.

        Raises:
            UsageError: the first row is not the first of a block.
        """
        if first % self.rows:
            raise UsageError(f"a mask in blocks of {self.rows} rows cannot be cut at row {first}; cut between blocks")
        return replace(self, starts=self.starts[..., first // self.rows : -(-stop // self.rows) + 1])

    def owners(self) -> Tensor:
        """The number of the list ``[entries]``, counted over batch rows, heads and row blocks, that each entry is in.

        An entry that no list has gets the number of lists.
        """
        begins, ends = (part.reshape(-1).long() for part in (self.starts[..., :-1], self.starts[..., 1:]))
        entry = torch.arange(self.index.numel(), device=ends.device)
        owner = torch.searchsorted(ends, entry, right=True)
        # Entries before a list's begin are those of rows or heads that were cropped away.
        begin = torch.cat([begins, begins.new_full((1,), self.index.numel())])[owner]
        return torch.where(entry >= begin, owner, ends.numel())

    def transposed(self, num_k: int) -> KeyBlocks:
        """The row blocks that see each key block: a record whose rows are keys, for the gradient of keys and values."""
        row_blocks, key_blocks = self.starts.shape[-1] - 1, -(-num_k // self.keys)
        groups = self.starts.shape[0] * self.starts.shape[1]
        owner = self.owners()
        place = owner // row_blocks * key_blocks + self.index  # unused entries come last
        ordered, order = place.sort(stable=True)
        first = torch.arange(groups, device=place.device)[:, None] * key_blocks
        wanted = first + torch.arange(key_blocks + 1, device=place.device)
        starts = torch.searchsorted(ordered, wanted).view(*self.starts.shape[:2], -1)
        return KeyBlocks(starts.int(), (owner % row_blocks)[order].int(), self.keys, self.rows)

    def listed(self, num_k: int) -> Tensor:
        """Which key blocks each row block may see, bool ``[B or 1, H or 1, row blocks, key blocks]``."""
        row_blocks, key_blocks = self.starts.shape[-1] - 1, -(-num_k // self.keys)
        groups = self.starts.shape[0] * self.starts.shape[1]
        seen = torch.zeros(groups * row_blocks + 1, key_blocks, dtype=torch.bool, device=self.index.device)
        seen[self.owners(), self.index.long()] = True  # unused entries go to the row that is left out
        return seen[:-1].view(*self.starts.shape[:2], row_blocks, key_blocks)

    def seen(self, num_q: int, num_k: int) -> Tensor:
        """The mask as a bool tensor ``[B or 1, H or 1, Sq, Skv]``, for tests and debugging: takes quadratic memory."""
        wide = self.listed(num_k).repeat_interleave(self.rows, 2).repeat_interleave(self.keys, 3)
        return wide[:, :, :num_q, :num_k]

    def runs(self, batch: int, head: int = 0) -> list[list[tuple[int, int]]]:
        """The keys ``[first, last)`` that each row block of one head sees, neighbouring blocks joined."""
        starts = self.starts[min(batch, self.starts.shape[0] - 1), min(head, self.starts.shape[1] - 1)].tolist()
        index, result = self.index.tolist(), []
        for begin, end in pairwise(starts):
            joined: list[tuple[int, int]] = []
            for block in index[begin:end]:
                low, high = block * self.keys, (block + 1) * self.keys
                if joined and joined[-1][1] == low:
                    low = joined.pop()[0]
                joined.append((low, high))
            result.append(joined)
        return result


def starts_of(counts: Tensor) -> Tensor:
    """``starts`` of lists with so many entries, integer ``[B or 1, H or 1, row blocks]``, one behind the other."""
    batch, heads, row_blocks = counts.shape
    ends = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts.view(-1), 0, dtype=torch.int32, out=ends[1:])
    # A head's last end is the next one's first start, so their views overlap.
    return ends.as_strided((batch, heads, row_blocks + 1), (heads * row_blocks, row_blocks, 1))
