"""The texts of an evaluation as tokens; read before any model is, since texts are what is mistyped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rehead.data.beginning import text_start
from rehead.data.tokens import load_tokenizer, token_stream
from rehead.errors import UsageError
from rehead.recipes.evaluation.models import open_named
from rehead.recipes.evaluation.needle import require_length
from rehead.recipes.evaluation.options import EvaluateOptions

#: What is read where no text is named.
HELD_OUT = "built-in:heldout"


@dataclass(frozen=True)
class TokenisedText:
    """A text as the models read it.

    Attributes:
        name: as the user wrote it.
        tokens: int64 [T].
        start: int64 [p], how the tokenizer begins a text.
        bytes: UTF-8 bytes that they stand for.
    """

    name: str
    tokens: Tensor
    start: Tensor
    bytes: int


def read_texts(data: Sequence[str], name: str, options: EvaluateOptions) -> list[TokenisedText]:
    """The texts as tokens of a checkpoint's tokenizer.

    Args:
        data: texts, as ``rehead.data.sources.read_documents`` takes them.
        name: the checkpoint.
        options: how much of each is read, and for what.

    Raises:
        UsageError: a text that cannot be read or is shorter than one window; the first is shorter than a context in
            which a needle is to be found.
    """
    if not data:
        return []
    tokenizer = load_tokenizer(open_named(name))
    texts = []
    for source in data:
        tokens = token_stream([source], tokenizer, options.tokens)
        if len(tokens) < options.window:
            raise UsageError(
                f"--data {source}: has {len(tokens)} tokens, less than one window of {options.window}; "
                "give more text or a smaller --window"
            )
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(TokenisedText(source, tokens, text_start(tokenizer), len(text.encode("utf-8"))))
    require_length(texts[0].tokens, options.needle)
    return texts
