"""A new small language model: a byte-pair tokenizer trained on a text, and a LLaMA-class model with random weights.

``rehead uptrain --loss ce`` then trains it like any other checkpoint. This is how the model that ships with Rehead was
made (recipe ``embedded-pretrain``), and a quick way to a real model of one's own for tests and studies.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rehead.counts import Count, Length, Seed
from rehead.errors import UsageError
from rehead.options import Options

END_OF_TEXT = "<|endoftext|>"


class NewModel(Options):
    """The shape of a new LLaMA-class model."""

    vocab_size: Count = Field(
        4096, description="Tokens of the byte-pair tokenizer, bytes and the end-of-text token too."
    )
    hidden_size: Count = Field(256, ge=1, description="Channels of the residual stream.")
    intermediate_size: Count = Field(688, ge=1, description="Columns of the gated feed-forward network.")
    num_hidden_layers: Count = Field(6, ge=1, description="Decoder layers.")
    num_attention_heads: Count = Field(8, ge=1, description="Query heads; hidden_size over them is the head_dim.")
    num_key_value_heads: Count = Field(8, ge=1, description="KV heads; as many as query heads is MHA.")
    max_position_embeddings: Length = Field(1024, ge=1, description="The longest context.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")
    tie_word_embeddings: bool = Field(True, description="One matrix for tokens in and out.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Of the stored weights; training keeps float32 copies of its own."
    )
    seed: Seed = Field(0, description="Of the weights.")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level byte-pair tokenizer (Sennrich et al. 2016, arXiv 1508.07909) trained on documents.

    Byte-level, so any text is tokenised and comes back unchanged; whole digits, so numbers do not fill the vocabulary.

    Returns:
        a ``PreTrainedTokenizerFast`` whose end-of-text token is ``<|endoftext|>``, id 0.

    Raises:
        UsageError: the documents are too few for that vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise UsageError(f"vocab_size {vocab_size}: cannot hold the 256 bytes and {END_OF_TEXT}; give 257 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"vocab_size {vocab_size}: the texts give only {tokenizer.get_vocab_size()} tokens; give more text or a "
            "smaller vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def new_model(out: Path, documents: Iterable[str], shape: NewModel | None = None) -> Path:
    """Write a checkpoint with random weights and a tokenizer of its own.

    Args:
        out: the folder to write; must not exist.
        documents: what the tokenizer is trained on.
        shape: of the model; the defaults of :class:`NewModel` when None.

    Raises:
        UsageError: ``out`` exists, the shape is impossible, or the documents are too few.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rehead.checkpoints.files import whole
    from rehead.console import quiet_transformers

    shape = shape or NewModel()
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another folder or remove it")
    if shape.hidden_size % shape.num_attention_heads or shape.num_attention_heads % shape.num_key_value_heads:
        raise UsageError(
            f"{shape.num_attention_heads} query and {shape.num_key_value_heads} KV heads: do not divide a hidden size "
            f"of {shape.hidden_size} evenly; choose divisors"
        )
    tokenizer = train_tokenizer(documents, shape.vocab_size)
    numbers = shape.model_dump()
    theta, seed = numbers.pop("rope_theta"), numbers.pop("seed")
    config = LlamaConfig(
        **numbers,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, shape.dtype))
        with whole(out) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return out
