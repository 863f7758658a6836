"""From rows to the arguments of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.data.store import IGNORED, Rows
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes

_CPU_TOKENS = 4096  # of a forward pass: more would leave the caches


def first_micro_batch(options: UptrainOptions, run: Processes) -> int:
    """Rows in a forward pass, as asked for or to begin with: a GPU is given all of its share of a step."""
    share = options.rows_per_step // run.world
    by_default = share if run.device.type == "cuda" else max(_CPU_TOKENS // options.seq_length, 1)
    return min(options.micro_batch or by_default, share)


def forward_inputs(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Arguments of :class:`~rehead.recipes.training.losses.StudentWithLoss`, on the device.

    What is the default is left out, which spares the model looking at it: positions where every row is one document.
    Where labels count is found here, on the host; finding it on a GPU would wait for all that is queued there.
    """
    inputs = {"input_ids": rows.input_ids, "labels": rows.labels}
    if bool((rows.position_ids[:, 1:] <= rows.position_ids[:, :-1]).any()):
        inputs["position_ids"] = rows.position_ids
    inputs["counted_index"] = (rows.labels.flatten() != IGNORED).nonzero().squeeze(-1)
    if device.type == "cuda":
        inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
