"""Student and teacher: found, loaded, checked to fit together, and made ready to train."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rehead.checkpoints.opening import split_revision
from rehead.checkpoints.smallfiles import MANIFEST_NAME
from rehead.checkpoints.source import Source
from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, UsageError, first_line
from rehead.models.config import causal_lm_class, resolve_config
from rehead.models.live import evaluating
from rehead.models.remote import open_known, weights_for_loading
from rehead.recipes.training.options import UptrainOptions


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is open but not loaded.

    Attributes:
        name: as the user wrote it.
        source: its files.
        config: transformers' config.
        conversion: its ``rehead.json``, or an empty dict.
    """

    name: str
    source: Source
    config: Any
    conversion: dict[str, Any]


def open_checkpoint(name: str) -> Opened:
    """Open a folder or a Hub id (``owner/name`` or ``owner/name@revision``); no weight is read.

    Raises:
        UsageError: there is no such checkpoint.
        UnsupportedError: it is quantised, an encoder-decoder, in another format, or of a type that transformers does
            not have.
    """
    source = open_known(*split_revision(name))
    if source.config.get("quantization_config"):
        raise UnsupportedError(f"{name}: is quantised and cannot be trained; give the unquantised checkpoint")
    conversion = {}
    if MANIFEST_NAME in source.list_files():
        try:
            conversion = json.loads(source.small_path(MANIFEST_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UnsupportedError(f"{name}: its {MANIFEST_NAME} cannot be read; convert it again") from None
    config = resolve_config(source.config, name)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name}: is an encoder-decoder, which does not continue running text; uptrain it with transformers' "
            "Seq2SeqTrainer on pairs of your own"
        )
    return Opened(name, source, config, conversion)


def teacher_name(student: Opened, options: UptrainOptions) -> str | None:
    """Which model teaches: the one asked for, or what the student was converted from where the loss needs one.

    Raises:
        UsageError: one is needed and none is known.
    """
    if options.teacher is not None:
        return options.teacher
    if not options.objective().needs_teacher:
        return None
    source, revision = student.conversion.get("source"), student.conversion.get("revision")
    if not source:
        raise UsageError(
            f"--loss {options.loss}: needs a teacher, and {student.name} does not say what it was converted from; "
            "give --teacher, or train with --loss ce"
        )
    return f"{source}@{revision}" if revision else str(source)


def same_tokens(student: Any, teacher: Any, names: tuple[str, str]) -> None:
    """Refuse a teacher that reads other tokens.

    Args:
        student, teacher: their tokenizers.
        names: what to call the two.

    Raises:
        UsageError: the vocabularies differ; says where first.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    odd = next((token for token in sorted(ours, key=ours.__getitem__) if theirs.get(token) != ours[token]), None)
    where = f"token {ours[odd]} is {odd!r} only in the first" if odd is not None else "the second has more tokens"
    raise UsageError(
        f"{names[0]} and {names[1]} have different vocabularies ({len(ours)} and {len(theirs)} tokens, {where}); "
        "give a teacher with the student's tokenizer"
    )


#: Config keys of what a model adds in training only: dropout of values, of layers, of stochastic depth, and jitter.
_NOISE = re.compile(r"dropout|layerdrop|_p?drop$|jitter")
#: PhiMoE's is a margin between experts, which it keeps in inference too.
_NOT_NOISE = frozenset({("phimoe", "router_jitter_noise")})


def load(opened: Opened, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a checkpoint with plain transformers, dropout and jitter off.

    Pretrained weights are trained on without noise: a short run needs no regularising, and a distance to the teacher
    should not hold noise of the student's own.

    Args:
        opened: the checkpoint.
        dtype: of the parameters.
        device: where they go.

    Raises:
        UnsupportedError: transformers cannot load it, or not all of it.
    """
    model_class: Any = causal_lm_class(opened.config)
    config = resolve_config(opened.source.config, opened.name)
    for key, value in vars(config).items():
        if isinstance(value, float) and _NOISE.search(key) and (config.model_type, key) not in _NOT_NOISE:
            setattr(config, key, 0.0)
    opened.source.materialise()
    folder = opened.source.small_path("config.json").parent
    for shard in opened.source.shards:
        opened.source.weight_path(shard)
    with quiet_transformers():
        try:
            loaded = model_class.from_pretrained(
                **weights_for_loading(opened.source, str(folder)),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
            )
        except Exception as error:
            raise UnsupportedError(
                f"{opened.name}: transformers cannot load it ({first_line(error)}); verify it"
            ) from None
    model, info = loaded
    broken = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if broken:
        raise UnsupportedError(f"{opened.name}: {broken[0]} is missing or of another shape; run `rehead verify` on it")
    return model.to(device)


#: Rows up to which the fused kernels behind SDPA, masks and all, outrun the tiled ones on a GPU (`docs/notes`).
_SDPA_ROWS = 2048


def set_attention(model: Any, attention: str, name: str, length: int | None = None) -> str:
    """Choose the attention implementation of a live model.

    Args:
        model: changed in place.
        attention: ``auto`` (tiled where it applies, else what transformers chose; on a GPU that choice too where it is
            SDPA and rows are short), ``tiled``, or transformers' own.
        name: what to call the model.
        length: tokens in a row, where they are known.

    Returns:
        The implementation in use.

    Raises:
        UsageError: there is no such implementation.
        UnsupportedError: ``tiled`` was asked for and the model cannot have it.
    """
    from rehead.patches import patch_model

    chosen, device = str(model.config._attn_implementation), next(model.parameters()).device
    if attention == "auto" and device.type == "cuda" and chosen == "sdpa" and length and length <= _SDPA_ROWS:
        return chosen
    if attention in ("auto", "tiled"):
        try:
            patch_model(model, "tiled").apply()
            return "tiled"
        except UnsupportedError:
            if attention == "tiled":
                raise
            return str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError):
        raise UsageError(
            f"--attention {attention}: {name} cannot use it here; choose auto, tiled, sdpa or eager"
        ) from None
    return attention


def checkpoint_activations(model: Any) -> None:
    """Let a model recompute activations in the backward pass.

    Raises:
        UnsupportedError: its class cannot.
    """
    try:
        # The later name is that of newer versions of transformers, which warn of the earlier.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise UnsupportedError(
            f"--gradient-checkpointing: {type(model).__name__} cannot do it; give a smaller --micro-batch instead"
        ) from None


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Hold tensors once that student and teacher have in common and that do not train.

    Args:
        student: with ``requires_grad`` set.
        teacher: its parameters are replaced where the student's of the same name are frozen and equal, byte by byte.

    Returns:
        Bytes saved.
    """
    ours = dict(student.named_parameters(remove_duplicate=False))
    saved, seen = 0, set()
    for name, theirs in list(teacher.named_parameters(remove_duplicate=False)):
        mine = ours.get(name)
        if mine is None or mine.requires_grad or mine is theirs or mine.shape != theirs.shape:
            continue
        if mine.dtype != theirs.dtype or mine.device != theirs.device or not torch.equal(mine, theirs):
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(owner), leaf, mine)
        if id(theirs) not in seen:
            saved += theirs.numel() * theirs.element_size()
            seen.add(id(theirs))
    return saved


_LENGTH = 12
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def prove_isolation(model: Any, name: str) -> float:
    """Run two documents packed into one row, and again with another first document: the second must not notice.

    Args:
        model: a causal language model; its attention is told of documents by ``position_ids`` that restart.
        name: what to call it.

    Returns:
        The largest change of the second document's logits, relative to their size.

    Raises:
        UnsupportedError: it did notice.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (2, 2 * _LENGTH), generator=generator)
    rows[1, _LENGTH:] = rows[0, _LENGTH:]
    positions = torch.arange(_LENGTH).repeat(2).expand(2, -1)
    with evaluating(model):
        logits = model(input_ids=rows.to(device), position_ids=positions.to(device), use_cache=False).logits
        alone = model(input_ids=rows[:1, _LENGTH:].to(device), use_cache=False).logits[0].float()
    packed = logits[:, _LENGTH:].float()
    size = packed.abs().max().clamp_min(1e-6)
    seen = float((packed[0] - packed[1]).abs().max() / size)
    moved = float((packed[0] - alone).abs().max() / size)
    limit = _TOLERANCE.get(dtype, 5e-2)
    if not (seen <= limit and moved <= limit):  # what is no number is over it
        raise UnsupportedError(
            f"{name}: packed documents see each other in this class (logits change by {max(seen, moved):.1e}); "
            "train with --packing joined"
        )
    return max(seen, moved)
