"""A little of the text that ships with Rehead, for measurements that must be quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rehead.checkpoints.source import Source
from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.data.beginning import begun, text_start
from rehead.data.sources import read_documents
from rehead.lazy import late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

#: Not in what calibration and training take by default.
TEXT = "built-in:heldout"
RANDOM = "random tokens"
#: More characters than a token has on average.
_CHARACTERS = 8


@dataclass(frozen=True)
class Sample:
    """Tokens to measure on.

    Attributes:
        tokens: int64 [rows, length]; each row begins as the tokenizer begins a text.
        name: of the text; :data:`RANDOM` where the model has no tokenizer that fits it.
    """

    tokens: Tensor
    name: str

    @property
    def is_text(self) -> bool:
        """Whether these are words rather than random tokens."""
        return self.name != RANDOM


def sample(source: Source, vocabulary: int, rows: int, length: int) -> Sample:
    """The first ``rows * length`` tokens of a built-in text, or random ones where there is no tokenizer.

    Args:
        source: the model, for its tokenizer.
        vocabulary: rows of its embedding.
        rows: number of sequences.
        length: tokens per sequence.
    """
    try:
        tokenizer = open_tokenizer(source)
        text = next(iter(read_documents([TEXT])))[: _CHARACTERS * rows * length]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
        tokens = begun(ids[: rows * length].view(rows, length), text_start(tokenizer))
    except Exception:  # whatever a tokenizer of somebody's raises
        tokens = None
    if tokens is None or int(tokens.max()) >= vocabulary:
        generator = torch.Generator().manual_seed(0)
        return Sample(torch.randint(0, vocabulary, (rows, length), generator=generator), RANDOM)
    return Sample(tokens, TEXT)
