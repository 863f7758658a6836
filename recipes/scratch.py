"""A new small language model: a byte-pair tokenizer trained on a text, and a LLaMA-class model with random weights.

``rehead uptrain --loss ce`` then trains it like any other checkpoint. This is how the model that ships with Rehead was
made (recipe ``embedded-pretrain``), and a quick way to a real model of one's own for tests and studies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rehead.errors import UsageError

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class NewModel:
    """The shape of a new LLaMA-class model.

    Attributes:
        vocab_size: tokens of the byte-pair tokenizer, bytes and the end-of-text token among them.
        hidden_size: channels of the residual stream.
        intermediate_size: columns of the gated feed-forward network.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads; ``hidden_size`` over them is the ``head_dim``.
        num_key_value_heads: KV heads; as many as query heads is MHA.
        max_position_embeddings: the longest context.
        rope_theta: base of the rotary frequencies.
        tie_word_embeddings: one matrix for tokens in and out.
        dtype: the weights are stored in; training keeps float32 copies of its own.
        seed: of the weights.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    dtype: str = "bfloat16"
    seed: int = 0


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


def new_model(out: Path, documents: Iterable[str], shape: NewModel = NewModel()) -> Path:
    """Write a checkpoint with random weights and a tokenizer of its own.

    Args:
        out: the folder to write; must not exist.
        documents: what the tokenizer is trained on.
        shape: of the model.

    Raises:
        UsageError: ``out`` exists, the shape is impossible, or the documents are too few.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rehead.models.meta import quiet_transformers

    if out.exists():
        raise UsageError(f"{out}: exists already; choose another folder or remove it")
    if shape.hidden_size % shape.num_attention_heads or shape.num_attention_heads % shape.num_key_value_heads:
        raise UsageError(
            f"{shape.num_attention_heads} query and {shape.num_key_value_heads} KV heads: do not divide a hidden size "
            f"of {shape.hidden_size} evenly; choose divisors"
        )
    if shape.dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {shape.dtype!r}: is not known; choose float32, bfloat16 or float16")
    tokenizer = train_tokenizer(documents, shape.vocab_size)
    numbers = asdict(shape)
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
        part = out.with_name(out.name + ".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(out)
    return out
