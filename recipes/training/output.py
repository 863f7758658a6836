"""From trained weights to a plain checkpoint: the student's own files with the changed tensors in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rehead.checkpoints.manifest import made_by
from rehead.checkpoints.markdown import code, code_block, without_folders
from rehead.checkpoints.shards import OutputTensor, parse_size, plan_shards
from rehead.checkpoints.source import Source, torch_dtype
from rehead.checkpoints.target import Target
from rehead.errors import UnsupportedError, VerificationError
from rehead.models.modeling import carried_files
from rehead.recipes.training.checkpoints import gathered
from rehead.recipes.training.log import LOG_NAME
from rehead.recipes.training.models import Opened
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
        return lambda: gathered(tensor)

    return {
        name: giver(masters[id(parameter)])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in masters
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains, under every name that the model has for it."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def sketched(changed: Mapping[str, Tensor]) -> Changed:
    """The same tensors as shapes without data: enough for :func:`plan_output` to find their places."""

    def giver(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return {name: giver(tensor) for name, tensor in changed.items()}


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
    left = [names for names in _aliases(model, changed) if not placed & set(names)]
    single = {names[0]: changed[names[0]] for names in left if len(names) == 1}
    reverted = _reverted(model, single)
    for names in left:
        if len(names) > 1:  # tied: one of the names has a place
            tried = [_reverted(model, {name: changed[name]}) for name in names]
            reverted |= next((one for one in tried if not _unplaced(one, source)), tried[0])
    places = _places(reverted, source)
    lost = next((name for name in reverted if name not in places), None)
    if lost is not None:
        raise UnsupportedError(
            f"{source.id}: {lost} was trained but the checkpoint has no such tensor; train other parts (--train)"
        )
    givers |= {places[name]: (lambda tensor=tensor: tensor) for name, tensor in reverted.items()}  # type: ignore[misc]
    entries = [
        OutputTensor(info.name, info.dtype, info.shape, None if info.name in givers else info.name)
        for info in source.tensors.values()
    ]
    return entries, givers


def _aliases(model: nn.Module, changed: Changed) -> list[list[str]]:
    """The names of ``changed``, those of one parameter together."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int | str, list[str]] = {}
    for name in changed:
        groups.setdefault(id(parameters[name]) if name in parameters else name, []).append(name)
    return list(groups.values())


def _reverted(model: Any, changed: Changed) -> dict[str, Tensor]:
    """Tensors in the form and under the names that transformers saves them with."""
    if not changed:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, {name: give() for name, give in changed.items()}))


def _unplaced(tensors: Mapping[str, Tensor], source: Source) -> bool:
    return len(_places(tensors, source)) < len(tensors)


def _places(tensors: Mapping[str, Tensor], source: Source) -> dict[str, str]:
    """The checkpoint's name of each tensor, where it has one of that shape.

    Checkpoints of one class differ in what stands before a name (``model.``, ``model.language_model.``, nothing), and
    loaders take them all. So the longest end of a name decides that a single tensor shares; where several do (a vision
    tower's, say), what stood before the others.
    """
    ends: dict[str, list[str]] = {}
    for name in source.tensors:
        parts = name.split(".")
        for at in range(len(parts) - 1):
            ends.setdefault(".".join(parts[at:]), []).append(name)
    found: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    before: Counter[tuple[str, str]] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        tails = (".".join(parts[at:]) for at in range(len(parts) - 1))
        tail = next((tail for tail in tails if tail in ends), None)
        fitting = [other for other in ends.get(tail or "", []) if _fits(tensor, source, other)]
        if tail is not None and len(fitting) == 1:
            found[name] = fitting[0]
            before[name.removesuffix(tail), fitting[0].removesuffix(tail)] += 1
        elif fitting:
            several[name] = fitting
    for name, fitting in several.items():
        for (mine, other), _ in before.most_common():
            if name.startswith(mine) and other + name.removeprefix(mine) in fitting:
                found[name] = other + name.removeprefix(mine)
                break
    taken = Counter(found.values())
    return {name: place for name, place in found.items() if taken[place] == 1}


def _fits(tensor: Tensor, source: Source, name: str) -> bool:
    return tuple(tensor.shape) == tuple(source.tensors[name].shape)


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
    teacher = f", taught by {code(without_folders(facts['teacher']))}" if facts["teacher"] else ""
    lines = [
        card.rstrip(),
        "",
        "## Uptraining",
        "",
        f"{code(Path(student).name)} was trained on {facts['tokens']:,} tokens by Rehead {__version__}{teacher}: loss "
        f"`{options['loss']}`, learning rate {facts['learning_rate']:g}, {options['schedule']} schedule, "
        f"{facts['steps']} steps of {facts['batch_tokens']:,} tokens. `{LOG_NAME}` has every step.",
        "",
        *code_block(without_folders(command)),
        "",
    ]
    return "\n".join(lines).lstrip("\n")
