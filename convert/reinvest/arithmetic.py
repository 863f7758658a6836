"""How wide: integers in, integers out. Only the matrices of a block count, neither biases, norms nor embeddings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSizes:
    """The sizes that decide how many weights a block has.

    Attributes:
        hidden: channels of the residual stream.
        heads: query heads of ``head_dim`` channels.
        head_dim: channels of a head.
        ffn: channels of the FFN.
        ffn_matrices: matrices of ``hidden`` times ``ffn``: 3 where it is gated, else 2.
    """

    hidden: int
    heads: int
    head_dim: int
    ffn: int
    ffn_matrices: int

    def weights(self, kv: int) -> int:
        """Weights of one block with ``kv`` KV heads."""
        attention = 2 * (self.heads + kv) * self.head_dim
        return self.hidden * (attention + self.ffn_matrices * self.ffn)


def ffn_width(sizes: BlockSizes, before: int, after: int, multiple: int) -> int:
    """FFN channels that give back what going from ``before`` to ``after`` KV heads freed, rounded up to a multiple.

    ``2 n (K - K') D`` weights are freed, and a channel costs one row or column of n in each matrix.
    """
    freed = sizes.weights(before) - sizes.weights(after)
    return _up(sizes.ffn * sizes.ffn_matrices * sizes.hidden + freed, sizes.ffn_matrices * sizes.hidden * multiple) * (
        multiple
    )


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
        return BlockSizes(hidden, heads, sizes.head_dim, ffn, sizes.ffn_matrices).weights(after)

    step = sizes.head_dim * after
    low = max(1, sizes.hidden // step)
    while at(low * step) < wanted:
        low += 1
    return low * step


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
