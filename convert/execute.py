"""Running a plan: stream the source into a staged folder, one layer live at a time."""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.manifest import made_by
from rehead.checkpoints.source import torch_dtype
from rehead.checkpoints.target import Target, finish_commit
from rehead.console import Progress
from rehead.convert.card import model_card
from rehead.convert.options import ConvertOptions
from rehead.convert.planning import Plan, make_plan, moves_queries
from rehead.errors import UsageError
from rehead.models.device import resolve_device
from rehead.models.families.layouts import merge
from rehead.models.model import open_model
from rehead.models.modeling import carried_files
from rehead.models.rewritten import cast
from rehead.options import takes
from rehead.variants.blocks.layer_choice import is_auto
from rehead.variants.pool.methods.registry import MethodContext
from rehead.variants.pool.regroup import LayerResult, regroup
from rehead.version import __version__


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        out: the finished folder.
        plan: what was planned.
        layers: groups and reconstruction errors of each layer.
        seconds: wall time.
    """

    out: Path
    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        table = self.plan.as_json()
        table.pop("changes")
        return {"out": str(self.out), "seconds": round(self.seconds, 2), **table, "layer_errors": self.layers}


LayerProvider = Callable[[int], dict[str, Tensor]]
"""Gives the new tensors of a layer; may be asked again for a layer it has given before."""


class DirectLayers:
    """Layers computed from the weights alone, when they are first needed; the last two are kept.

    A checkpoint may split a layer over two shards or order its tensors by name; two layers cover both, and any other
    order costs a second computation, never memory.
    """

    def __init__(self, plan: Plan, report: dict[int, dict[str, Any]], target: Target) -> None:
        self._plan, self._report, self._target = plan, report, target
        self._copied = {tensor.name for tensor in plan.outputs if tensor.origin is not None}
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __call__(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._kept:
            result = self.compute(layer)
            self._report[layer] = result.as_json()
            # A resumed run does not compute again what stands in finished files.
            self._target.remember(str(layer), self._report[layer])
            self._kept[layer] = layer_tensors(self._plan, layer, result)
            while len(self._kept) > 2:
                self._kept.popitem(last=False)
        return self._kept[layer]

    def compute(self, layer: int) -> LayerResult:
        """Regroup one layer."""
        model, options = self._plan.model, self._plan.options
        context = MethodContext(layer, options.seed, None, getattr(model.config, "initializer_range", 0.02) or 0.02)
        # What the method leaves alone is copied as bytes and need not be read here, but for norm weights that all heads
        # share: they bound what may be rotated.
        copied = set() if moves_queries(options) else self._copied
        tensors = {
            name: tensor if name in copied else model.read(name, layer)
            for name, tensor in model.meta_layer(layer).items()
        }
        return regroup(model.heads(layer, tensors), self._plan.kv, options.method, options.grouping, context)


def layer_tensors(plan: Plan, layer: int, result: LayerResult, keep_float: bool = False) -> dict[str, Tensor]:
    """A regrouped layer's tensors under the checkpoint's names and in the planned dtypes (as they are when
    ``keep_float``)."""
    tensors = merge(plan.model.family, layer, result.heads, plan.model.source.tensors)
    if keep_float:
        return tensors
    dtypes = {tensor.name: torch_dtype(tensor.dtype) for tensor in plan.outputs}
    return {name: cast(name, tensor, dtypes[name]) for name, tensor in tensors.items() if not tensor.is_meta}


@takes(ConvertOptions)
def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint: to fewer KV heads, to another class that computes the same, or both.

    Args:
        model: a local folder or a Hub id.
        out: the folder to write; must not exist unless ``overwrite`` or ``resume``.
        device: where calibration runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        revision: Hub revision of ``model``.
        resume: continue from what a killed run left.
        overwrite: replace an existing checkpoint at ``out``.
        push_to_hub: upload the result to this repository.
        progress: called with (stage, done, total).
        command: recorded in the manifest and the model card; the Python call when None.

    Returns:
        What was done; ``out`` holds a plain checkpoint, ``rehead.json`` and a model card.

    Raises:
        UsageError: an invalid argument.
        UnsupportedError: a model that cannot be converted, broken input, or a full disk; ``out`` is as it was.
    """
    asked = ConvertOptions.parse(options)
    resolve_device(device)
    started = time.monotonic()
    opened = open_model(model, revision)
    with opened.source:
        chosen: dict[str, Any] = {}
        if is_auto(asked.layers):
            from rehead.variants.blocks.auto import choose

            asked, chosen = choose(opened, asked, resolve_device(device), progress)
        plan = make_plan(opened, asked)
        if plan.model.family.guessed and plan.kv != plan.model.num_kv_heads:
            from rehead.convert.prove_layout import prove_layout

            prove_layout(plan.model)
        result = _execute(plan, out, device, resume, overwrite, progress, command, chosen)
    result.seconds = time.monotonic() - started
    if push_to_hub:
        from rehead.checkpoints.push import push_folder

        push_folder(result.out, push_to_hub)
    return result


@takes(ConvertOptions)
def plan(model: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> Plan:
    """The exact change that :func:`convert` would make; reads config and headers only.

    Args:
        model: a local folder or a Hub id.
        revision: Hub revision.
    """
    asked = ConvertOptions.parse(options)
    if is_auto(asked.layers):
        raise UsageError(
            "--layers auto: chooses by running the model, which a plan does not; name the layers or convert"
        )
    return make_plan(open_model(model, revision), asked)


def _execute(
    plan: Plan,
    out: str | os.PathLike[str],
    device: str,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    command: str | None,
    chosen: dict[str, Any],
) -> Conversion:
    model, options = plan.model, plan.options
    result = Conversion(Path(out), plan)
    command = command or f"rehead.convert.convert(..., num_key_value_heads={plan.kv})"
    fingerprint = {
        "source": model.source.fingerprint(),
        "options": options.as_json(),
        "plan": [[t.name, t.dtype, list(t.shape), t.origin] for t in plan.outputs],
        "version": [__version__, torch.__version__],
        "device": device if options.needs_calibration else "",
    }
    finished = finish_commit(out, fingerprint) if resume else None
    if finished is not None:  # the run that is resumed was killed in its last step
        result.layers = {int(layer): errors for layer, errors in finished["layers"].items()}
        return result
    with Target(out, source=model.source, overwrite=overwrite, resume=resume, fingerprint=fingerprint) as target:
        result.layers.update({int(layer): errors for layer, errors in target.remembered.items()})
        provider: LayerProvider = DirectLayers(plan, result.layers, target)
        details: dict[str, Any] = {}
        if plan.calibrated:
            from rehead.convert.calibrated import calibrate

            provider, details = calibrate(plan, target.work_dir, resolve_device(device), result.layers, progress)
        _write(plan, target, provider, progress)
        target.copy_small_files(skip=("config.json",))
        target.write_text("config.json", json.dumps(plan.raw_config, indent=2, ensure_ascii=False) + "\n")
        for name, text in carried_files(plan.raw_config).items():
            target.write_text(name, text)
        if chosen:
            details["chosen_layers"] = chosen
        target.write_text("README.md", model_card(plan, result.layers, command, details))
        target.commit(manifest(plan, result.layers, command, details))
    return result


def _write(plan: Plan, target: Target, provider: LayerProvider, progress: Progress | None) -> None:
    layers, dtypes = plan.layer_of, {tensor.name: torch_dtype(tensor.dtype) for tensor in plan.outputs}

    widened = plan.widening.changes if plan.widening else {}

    def fetch(name: str) -> Tensor:
        tensor = provider(layers[name])[name] if name in layers else cast(name, plan.model.read(name), dtypes[name])
        return widened[name](tensor) if name in widened else tensor

    tick = None if progress is None else lambda done, total: progress("writing", done, total)
    target.write_weights(plan.outputs, fetch, plan.options.max_shard_size, tick)


def manifest(plan: Plan, layers: dict[int, dict[str, Any]], command: str, details: dict[str, Any]) -> dict[str, Any]:
    """What ``rehead.json`` records, less the files and their hashes."""
    table = plan.as_json()
    return {
        **made_by(command),
        **{key: table[key] for key in (
            "source", "revision", "model_type", "host", "num_attention_heads", "head_dim", "num_key_value_heads",
            "kv_bytes_per_token", "parameters", "reinvest", "block", "exact", "rounded", "options", "config_changes",
        ) if key in table},
        "calibration": details,
        "layers": {str(layer): layers[layer] for layer in sorted(layers)},
        "changed_tensors": [change.name for change in plan.rewritten],
    }  # fmt: skip
