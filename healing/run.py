"""Healing a whole model: original and changed model side by side, one layer of each at a time.

Both are run over the same text. Before a layer is changed, the changed prefix has already run, so a layer is fitted to
the inputs that it will really get; what it ought to give is what the original gives on its own inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.files import whole
from rehead.console import Progress
from rehead.data.calibration import CalibrationText
from rehead.errors import first_line
from rehead.healing.job import Job
from rehead.healing.layer import Healer
from rehead.healing.layerwise import LayerwiseModel
from rehead.healing.runner import Runner, TextState

#: Tokens in one forward pass of a layer.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


def heal(
    job: Job,
    text: CalibrationText,
    work_dir: Path,
    device: torch.device,
    report: dict[int, dict[str, Any]],
    progress: Progress | None = None,
) -> tuple[Callable[[int], dict[str, Tensor]], dict[str, Any]]:
    """Change every layer of a job over calibration text and keep the results in ``work_dir``.

    Args:
        job: what to do.
        text: what to run the models over.
        work_dir: one file for each finished layer, which a run that resumes does not compute again.
        device: where layers run.
        report: filled with each layer's facts.

    Returns:
        (layer -> its new tensors, facts for the manifest).

    Raises:
        UnsupportedError: the model cannot be run layer by layer, or a weight is not finite.
    """
    batch_tokens = _BATCH_TOKENS.get(device.type, 4096)
    with torch.no_grad():
        original = Runner(LayerwiseModel(job.original, job.original.config, device), batch_tokens)
        changed = Runner(LayerwiseModel(job.changed, job.config, device), batch_tokens)
        hidden = _placed(original.model.embed(text.tokens, batch_tokens), device)
        changed.model.calls = original.model.calls
        healer, before = Healer(job, original, changed), TextState(hidden)
        prefix = before.clone()
        total = job.changed.config.num_hidden_layers
        for layer in range(total):
            if progress is not None:
                progress("calibrating", layer, total)
            original.model.load_layer(layer)
            if layer in job.layers:
                tensors = _heal_layer(healer, layer, before, prefix, work_dir, report)
                original.model.unload_layer(layer)
                changed.model.load_layer(layer, tensors)
                changed.run(layer, prefix)
                changed.model.unload_layer(layer)
            else:
                original.run(layer, prefix)
                original.run(layer, before)
                original.model.unload_layer(layer)
        if progress is not None:
            progress("calibrating", total, total)
    details = {
        "text": text.names,
        "tokens": text.count,
        "length": text.lengths[0] if len(text.lengths) == 1 else text.lengths,
        "device": str(device),
        "drift": round(_distance(prefix, before), 6),
    }

    def provide(layer: int) -> dict[str, Tensor]:
        done = _load(work_dir, layer)
        assert done is not None, f"layer {layer} was calibrated but its file is gone"
        return done[0]

    return provide, details


def _heal_layer(
    healer: Healer, layer: int, before: TextState, prefix: TextState, work_dir: Path, report: dict[int, dict[str, Any]]
) -> dict[str, Tensor]:
    """The layer's new tensors, computed or from an earlier run; ``before`` is brought through the original's."""
    done = _load(work_dir, layer)
    if done is None:
        done = healer.heal(layer, before, prefix)
        _save(work_dir, layer, *done)
    else:
        healer.original.run(layer, before)
    tensors, report[layer] = done
    return tensors


def _placed(hidden: list[Tensor], device: torch.device) -> list[Tensor]:
    """Keep the text's hidden states where the layers run, if several copies of them fit there."""
    if device.type == "cuda" and sum(part.nbytes for part in hidden) * 8 > torch.cuda.mem_get_info(device)[0]:
        return [part.cpu() for part in hidden]
    return hidden


def _distance(state: TextState, other: TextState) -> float:
    """Distance of hidden states from others, relative to the others' size."""

    def size(parts: Iterator[Tensor]) -> float:
        return sum(float(part.square().sum()) for part in parts)

    gap = size(a - b for a, b in zip(state.hidden, other.hidden))
    return (gap / max(size(iter(other.hidden)), 1e-24)) ** 0.5


def _save(folder: Path, layer: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a finished layer so that a kill leaves either all of it or nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(folder / f"layer-{layer:05d}.safetensors") as part:
        try:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, part, {"facts": json.dumps(facts)})
        except SafetensorError as error:  # wraps what the system says
            code = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else 0
            raise OSError(code, first_line(error)) from None


def _load(folder: Path, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    from safetensors import SafetensorError, safe_open

    path = folder / f"layer-{layer:05d}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as f:
            facts = json.loads((f.metadata() or {})["facts"])
            return {name: f.get_tensor(name) for name in f.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError):
        return None
