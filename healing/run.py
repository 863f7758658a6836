"""The calibrated conversion: original and converted model side by side, one layer of each at a time.

Both are run over the same text. Before a layer is converted, the converted prefix has already run, so a layer is fitted
to the inputs that it will really get; what it ought to give is what the original gives on its own inputs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.console import Progress
from rehead.convert.planning import Plan
from rehead.data.calibration import load_calibration
from rehead.errors import UsageError, first_line
from rehead.healing.layer import LayerHealer
from rehead.healing.layerwise import LayerwiseModel

#: Tokens in one forward pass of a layer.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


def calibrate(
    plan: Plan, work_dir: Path, device: str, report: dict[int, dict[str, Any]], progress: Progress | None
) -> tuple[Callable[[int], dict[str, Tensor]], dict[str, Any]]:
    """Convert every layer over calibration text and keep the results in ``work_dir``.

    Args:
        plan: what to do.
        work_dir: one file for each finished layer; a run that resumes goes on from them.
        device: where layers run.
        report: filled with each layer's groups and errors.
        progress: called with ("calibrating", layers done, layers).

    Returns:
        (layer -> its new tensors, facts for the manifest).

    Raises:
        UsageError: the calibration text or the device cannot be used.
        UnsupportedError: the model cannot be run layer by layer, or a weight is not finite.
    """
    from rehead.models.device import resolve_device

    where, options, model = resolve_device(device), plan.options, plan.model
    text = load_calibration(
        options.calibration,
        model.source,
        int(model.config.vocab_size),
        options.calibration_tokens,
        options.lengths_within(getattr(model.config, "max_position_embeddings", None)),
        options.seed,
    )
    batch_tokens = _BATCH_TOKENS.get(where.type, 4096)
    if max(int(part.max()) for part in text.tokens) >= int(model.config.vocab_size):
        raise UsageError(f"{model.source.id}: its tokenizer has more tokens than its vocabulary; check the tokenizer")
    with torch.no_grad():
        original = LayerwiseModel(plan.original, plan.original.config, where)
        converted = LayerwiseModel(model, plan.layer_config, where)
        hidden = _placed(original.embed(text.tokens, batch_tokens), where)
        converted.calls = original.calls
        healer = LayerHealer(plan, original, converted, batch_tokens)
        ours = [part.clone() for part in hidden]
        total = model.config.num_hidden_layers
        for layer in range(total):
            if progress is not None:
                progress("calibrating", layer, total)
            done = _load(work_dir, layer)
            original.load_layer(layer)
            if layer not in model.layers:
                ours, hidden = healer.run(original, layer, ours), healer.run(original, layer, hidden)
                original.unload_layer(layer)
                continue
            if done is None:
                tensors, facts, hidden = healer.convert(layer, hidden, ours)
                _save(work_dir, layer, tensors, facts)
            else:
                tensors, facts = done
                hidden = healer.run(original, layer, hidden)
            report[layer] = facts
            original.unload_layer(layer)
            converted.load_layer(layer, tensors)
            ours = healer.run(converted, layer, ours)
            converted.unload_layer(layer)
        if progress is not None:
            progress("calibrating", total, total)
    lengths = [part.shape[1] for part in text.tokens]
    gap, size = (sum(float(part.square().sum()) for part in parts) for parts in (_between(ours, hidden), hidden))
    details = {
        "text": text.names,
        "tokens": text.count,
        "length": lengths[0] if len(lengths) == 1 else lengths,
        "device": str(where),
        "drift": round((gap / max(size, 1e-24)) ** 0.5, 6),
    }

    def provide(layer: int) -> dict[str, Tensor]:
        found = _load(work_dir, layer)
        assert found is not None, f"layer {layer} was calibrated but its file is gone"
        return found[0]

    return provide, details


def _placed(hidden: list[Tensor], device: torch.device) -> list[Tensor]:
    """Keep the text's hidden states where the layers run, if several copies of them fit there."""
    if device.type == "cuda" and sum(part.nbytes for part in hidden) * 8 > torch.cuda.mem_get_info(device)[0]:
        return [part.cpu() for part in hidden]
    return hidden


def _between(ours: list[Tensor], theirs: list[Tensor]) -> Iterator[Tensor]:
    return (a - b for a, b in zip(ours, theirs))


def _save(folder: Path, layer: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a finished layer so that a kill leaves either all of it or nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from rehead.checkpoints.stream import write_error

    path, part = folder / f"layer-{layer:05d}.safetensors", folder / "part"
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, part, {"facts": json.dumps(facts)})
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        raise write_error(error, path.name) from None
    except SafetensorError as error:  # wraps what the system says
        code = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else 0
        raise write_error(OSError(code, first_line(error)), path.name) from None


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
