"""How wide: integers in, integers out. Only the matrices of blocks count, neither biases, norms nor embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BlockSizes:
    """The sizes that decide how many weights blocks have.

    Attributes:
        hidden: channels of the residual stream.
        heads: query heads of ``head_dim`` channels.
        head_dim: channels of a head.
        ffn: channels of the FFN.
        ffn_matrices: matrices of ``hidden`` times ``ffn`` in a block: 3 where it is gated, else 2.
        blocks: how many there are.
        attention_blocks: how many of them have attention; a hybrid's others have something else.
        other: weights of that, and of whatever else reads or writes the stream, for each hidden channel, all together.
    """

    hidden: int
    heads: int
    head_dim: int
    ffn: int
    ffn_matrices: int
    blocks: int = 1
    attention_blocks: int = 1
    other: int = 0

    @property
    def uniform(self) -> bool:
        """Whether every block is attention and FFN, so that one block's arithmetic is the model's."""
        return self.attention_blocks == self.blocks and not self.other

    @property
    def ffn_channel(self) -> int:
        """Weights of one FFN channel in every block."""
        return self.blocks * self.ffn_matrices * self.hidden

    def weights(self, kv: int) -> int:
        """Weights of the blocks with ``kv`` KV heads."""
        attention = 2 * (self.heads + kv) * self.head_dim * self.attention_blocks
        return self.hidden * (attention + self.other) + self.ffn * self.ffn_channel


def ffn_width(sizes: BlockSizes, before: int, after: int, multiple: int) -> int:
    """FFN channels that give back what going from ``before`` to ``after`` KV heads freed, rounded up to a multiple.

    ``2 n (K - K') D`` weights are freed where there is attention, and a channel costs one row or column of n in each
    matrix of every block.
    """
    freed = sizes.weights(before) - sizes.weights(after)
    return _up(sizes.ffn * sizes.ffn_channel + freed, sizes.ffn_channel * multiple) * multiple


def hidden_width(sizes: BlockSizes, before: int, after: int, multiple: int) -> int:
    """Hidden channels that give back what was freed, where heads and FFN keep their sizes, rounded up to a multiple.

    Every matrix of a block has the hidden size on one side, so a block's weights are linear in it.
    """
    return _up(sizes.weights(before), sizes.weights(after) // sizes.hidden * multiple) * multiple


def proportional_hidden_width(sizes: BlockSizes, before: int, after: int) -> int:
    """The same where the class ties them together: whole query heads fill the hidden size, the FFN keeps its ratio.

    The smallest m, a whole number of heads (a multiple of the KV heads), whose block has no fewer weights than before:
    for Falcon, ``10 m^2 + 128 m >= 12 n^2``.
    """
    wanted = sizes.weights(before)

    def at(hidden: int) -> int:
        heads = hidden // sizes.head_dim
        ffn = sizes.ffn * hidden // sizes.hidden
        return replace(sizes, hidden=hidden, heads=heads, ffn=ffn).weights(after)

    step = sizes.head_dim * after
    low = max(1, sizes.hidden // step)
    while at(low * step) < wanted:
        low += 1
    return low * step


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
