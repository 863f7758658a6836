"""What latent attention costs: cache, parameters and arithmetic, counted before anything is converted."""

from __future__ import annotations

from dataclasses import dataclass

from rehead.errors import UsageError


@dataclass(frozen=True)
class LatentSizes:
    """The dimensions of one layer's latent attention.

    Attributes:
        width: of what the layer reads and writes.
        num_heads: query heads.
        rank: numbers of the latent.
        rope_dim: numbers of the rotated key that all heads share.
        nope_dim: numbers of a head's queries and keys that do not rotate.
        value_dim: numbers of a head's values.
    """

    width: int
    num_heads: int
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        """What one more token adds to the cache. Tensor parallelism does not divide it: each rank holds all of it."""
        return self.rank + self.rope_dim

    @property
    def parameters(self) -> int:
        """Weights of the attention, the norm's among them, without biases."""
        queries = self.width * self.num_heads * (self.nope_dim + self.rope_dim)
        cached = self.width * self.numbers_per_token + self.rank
        up = self.rank * self.num_heads * (self.nope_dim + self.value_dim)
        return queries + cached + up + self.num_heads * self.value_dim * self.width

    def decode_flops(self, context: int, absorbed: bool = True) -> int:
        """Operations of one more token, multiplications and additions counted apart, behind ``context`` cached ones.

        Args:
            absorbed: queries and outputs meet the latents themselves, as in engines and in Rehead's kernel; otherwise
                keys and values of all heads are made again from all latents, as transformers does.
        """
        heads, up = self.num_heads, self.rank * self.num_heads * (self.nope_dim + self.value_dim)
        if absorbed:
            attention = context * heads * (2 * self.rank + self.rope_dim)
            return 2 * (self.parameters - self.rank + attention)
        attention = context * heads * (self.nope_dim + self.rope_dim + self.value_dim)
        return 2 * (self.parameters - self.rank - up + context * up + attention)


def rank_for(numbers: int, pairs: int, asked: str = "") -> int:
    """The latent that fills a cache of ``numbers`` per token beside ``pairs`` rotary pairs.

    Args:
        asked: the flag and what was given with it, for the message.

    Raises:
        UsageError: nothing is left for it.
    """
    rank = numbers - 2 * pairs
    if rank < 1:
        raise UsageError(
            f"{asked or f'a cache of {numbers}'}: is {numbers} numbers per token, and a rotated key of {2 * pairs} "
            f"leaves nothing of them for the latent; give {2 * pairs + 2} or more"
        )
    return rank


def splits(numbers: int, enough: int, pairs: int, multiple: int = 4) -> list[tuple[int, int]]:
    """(rotary pairs, rank) worth a short fit each: the best start in closed form is not always the best end.

    Args:
        numbers: cache per token.
        enough: pairs without which too little turns (:func:`~rehead.variants.latent.pairs.enough_pairs`).
        pairs: all of the layer's.
        multiple: pairs between the two are tried in multiples of so many.
    """
    between = (enough + pairs) // 2 // multiple * multiple
    tried = dict.fromkeys((enough, enough + multiple, between, pairs))
    # At least half of a small cache is for the latent.
    return [(count, numbers - 2 * count) for count in tried if enough <= count <= pairs and numbers >= 4 * count]
