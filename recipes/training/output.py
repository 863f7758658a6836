"""From trained weights to a plain checkpoint: the student's own files with the changed tensors in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rehead.checkpoints.manifest import made_by
from rehead.checkpoints.markdown import code, code_block
from rehead.checkpoints.shards import OutputTensor, parse_size, plan_shards
from rehead.checkpoints.source import Source, torch_dtype
from rehead.checkpoints.target import Target
from rehead.errors import UnsupportedError, VerificationError
from rehead.models.modeling import carried_files
from rehead.recipes.training.log import LOG_NAME
from rehead.recipes.training.models import Opened
from rehead.recipes.training.tensorfile import whole
from rehead.version import __version__

Changed = Mapping[str, Callable[[], Tensor]]
"""By name in the model, what gives a changed tensor whole, on the CPU; every process calls it."""

_KEPT = ("model_type", "num_attention_heads", "head_dim", "num_key_value_heads", "kv_bytes_per_token", "parameters")


def changed_tensors(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The trained tensors under every name that the model has for them (tied ones have several).

    Args:
        model: the student.
        trained: masters by parameter name.
    """
    masters = {id(parameter): trained[name] for name, parameter in model.named_parameters() if name in trained}

    def giver(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: whole(tensor)

    return {
        name: giver(masters[id(parameter)])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in masters
    }


def plan_output(model: Any, source: Source, changed: Changed) -> tuple[list[OutputTensor], dict[str, Callable]]:
    """Every tensor of the output, and what gives those that changed, by the checkpoint's names.

    Where the model in memory keeps weights in another form than the checkpoint does (experts merged into one tensor,
    say), transformers' own rules take them back.

    Raises:
        UnsupportedError: a trained tensor has no place in the checkpoint.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    givers: dict[str, Callable[[], Tensor]] = {}
    placed: set[str] = set()
    for name in source.tensors:
        inside = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in changed), None)
        if inside is not None:
            givers[name] = changed[inside]
            placed.add(inside)
    left = [name for name in changed if name not in placed and not _tied_to(model, name, placed)]
    if left:
        givers |= _reverted(model, source, {name: changed[name] for name in left})
    entries = [
        OutputTensor(info.name, info.dtype, info.shape, None if info.name in givers else info.name)
        for info in source.tensors.values()
    ]
    return entries, givers


def _tied_to(model: nn.Module, name: str, placed: set[str]) -> bool:
    """Whether a name is another one for a parameter that has its place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mine = parameters.get(name)
    return mine is not None and any(parameters.get(other) is mine for other in placed)


def _reverted(model: Any, source: Source, changed: Changed) -> dict[str, Callable[[], Tensor]]:
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(model, {name: give() for name, give in changed.items()})
    for name, tensor in found.items():
        if name not in source.tensors or tuple(tensor.shape) != tuple(source.tensors[name].shape):
            raise UnsupportedError(
                f"{source.id}: {name} was trained but the checkpoint has no such tensor; train other parts (--train)"
            )
    return {name: (lambda tensor=tensor: tensor) for name, tensor in found.items()}  # type: ignore[misc]


def write_output(
    out: Path,
    student: Opened,
    model: Any,
    changed: Changed,
    *,
    main: bool,
    fingerprint: Mapping[str, Any],
    uptraining: Mapping[str, Any],
    command: str,
    log: Path | None,
    overwrite: bool,
    progress: Callable[[str, float, float], None] | None = None,
) -> None:
    """Write OUT: tensors that did not train are copied as bytes, the others in the checkpoint's own dtype.

    Args:
        out: the folder.
        student: what was trained.
        model: it, live.
        changed: the trained tensors.
        main: whether this process writes; the others only take part in gathering.
        fingerprint: of the run.
        uptraining: what the manifest records of it.
        command: the command line or Python call.
        log: the training log.
        overwrite: replace an existing checkpoint at ``out``.
        progress: called with ("writing", bytes done, bytes).

    Raises:
        VerificationError: a trained weight is not finite.
        ResourceError: the disk is full; OUT is as it was.
    """
    source = student.source
    entries, givers = plan_output(model, source, changed)
    dtypes = {name: torch_dtype(info.dtype) for name, info in source.tensors.items()}

    def fetch(name: str) -> Tensor:
        tensor = givers[name]()
        if not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"{name}: is not finite after training; train with a lower --lr")
        return tensor.to(dtypes[name])

    if not main:
        shards = plan_shards(entries, source.tensors, parse_size("5GB"), source.metadata)
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            if tensor.name in givers:
                givers[tensor.name]()
        return
    tick = None if progress is None else lambda done, total: progress("writing", done, total)
    with Target(out, source=source, overwrite=overwrite, fingerprint=fingerprint) as target:
        target.write_weights(entries, fetch, "5GB", tick)
        target.copy_small_files(skip=("config.json", LOG_NAME))
        target.write_text("config.json", json.dumps(source.config, indent=2, ensure_ascii=False) + "\n")
        for name, text in carried_files(source.config).items():
            target.write_text(name, text)
        target.write_text("README.md", _card(source.model_card() or "", student.name, uptraining, command))
        if log is not None:
            target.write_bytes(LOG_NAME, log.read_bytes())
        target.commit(_manifest(student, uptraining, command))


def _manifest(student: Opened, uptraining: Mapping[str, Any], command: str) -> dict[str, Any]:
    conversion = {key: value for key, value in student.conversion.items() if key != "files"}
    earlier = {"uptraining_before": conversion.pop("uptraining")} if "uptraining" in conversion else {}
    return {
        **made_by(command),
        "source": student.source.id,
        "revision": student.source.revision,
        **{key: conversion[key] for key in _KEPT if key in conversion},
        "exact": False,
        "conversion": conversion.get("conversion", conversion) or None,
        "uptraining": dict(uptraining),
        **earlier,
    }


def _card(card: str, student: str, facts: Mapping[str, Any], command: str) -> str:
    """The student's card with a section on its uptraining."""
    options = facts["options"]
    teacher = f", taught by {code(facts['teacher'])}" if facts["teacher"] else ""
    lines = [
        card.rstrip(),
        "",
        "## Uptraining",
        "",
        f"{code(Path(student).name)} was trained on {facts['tokens']:,} tokens by Rehead {__version__}{teacher}: loss "
        f"`{options['loss']}`, learning rate {options['learning_rate']:g}, {options['schedule']} schedule, "
        f"{facts['steps']} steps of {facts['batch_tokens']:,} tokens. `{LOG_NAME}` has every step.",
        "",
        *code_block(command),
        "",
    ]
    return "\n".join(lines).lstrip("\n")
