"""What is recorded of a run: in its log's first line, in the manifest, and by ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rehead.data.store import TokenStore
from rehead.recipes.training.identity import code_version
from rehead.recipes.training.loop import peak_memory
from rehead.recipes.training.models import Opened
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes


def start_facts(
    options: UptrainOptions,
    run: Processes,
    student: Opened,
    teacher: Opened | None,
    store: TokenStore,
    attention: str,
    dtype: torch.dtype,
    trained: int,
) -> dict[str, Any]:
    """What is known before the first step.

    Args:
        options: of the run.
        run: the processes.
        student, teacher: open checkpoints.
        store: the tokens.
        attention: the implementation in use.
        dtype: of the arithmetic.
        trained: how many weights train.
    """
    cuda = run.device.type == "cuda"
    return {
        "student": student.name,
        "teacher": None if teacher is None else teacher.name,
        "options": options.model_dump(mode="json"),
        "steps": options.steps,
        "rows_per_step": options.rows_per_step,
        "batch_tokens": options.rows_per_step * options.seq_length,
        "data_tokens": store.facts.tokens,
        "data_documents": store.facts.documents,
        "data_sha256": store.facts.sha256,
        "epochs": round(options.steps * options.rows_per_step / store.rows(options.seq_length), 4),
        "trained_parameters": trained,
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(run.device) if cuda else run.device.type,
        "processes": run.world,
        "sharded": run.sharded,
        "versions": code_version(),
    }


def end_facts(
    start: Mapping[str, Any], options: UptrainOptions, run: Processes, seconds: float, last: Mapping[str, Any]
) -> dict[str, Any]:
    """The same with what the run came to.

    Args:
        start: of :func:`start_facts`.
        options: of the run.
        run: the processes.
        seconds: of training.
        last: figures of the last step and of the last evaluations.
    """
    return {
        **start,
        "tokens": options.steps * options.rows_per_step * options.seq_length,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(run.device),
        "last": dict(last),
    }
