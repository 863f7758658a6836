"""A checkpoint's model held whole in memory, for what has to be measured on all of it."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from rehead.checkpoints.source import Source
from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class, resolve_config
from rehead.models.model import Model
from rehead.models.remote import open_known, weights_for_loading


def load_whole(
    model: Model, device: torch.device, purpose: str, remedy: str = "", dtype: torch.dtype = torch.float32
) -> Any:
    """The model in one dtype, in evaluation mode.

    Args:
        model: an open checkpoint, also one that is read in another layout than its files'.
        device: where it goes.
        purpose: what it is loaded for, as the message says it: ``"choose layers"``.
        remedy: what to do where it cannot be loaded; ends the message.
        dtype: of its weights.

    Raises:
        UnsupportedError: transformers cannot load it.
    """
    return _loaded(model.source, model.config, device, purpose, remedy, dtype)


def load_result(folder: str | os.PathLike[str], device: torch.device, purpose: str) -> Any:
    """A checkpoint that a conversion wrote, in float32 and evaluation mode; also of classes that have no KV heads.

    Raises:
        UnsupportedError: transformers cannot load it.
    """
    source = open_known(folder, None)
    return _loaded(source, resolve_config(source.config, source.id), device, purpose, "", torch.float32)


def _loaded(source: Source, config: Any, device: torch.device, purpose: str, remedy: str, dtype: torch.dtype) -> Any:
    source.materialise()
    place = getattr(source, "folder", None) or source.id
    with quiet_transformers():
        try:
            live: Any = causal_lm_class(config).from_pretrained(
                **weights_for_loading(source, place),
                config=copy.deepcopy(config),  # transformers' own also where a record stood for it
                revision=source.revision or "main",
                dtype=dtype,
            )
        except Exception as error:
            line = f"{source.id}: cannot be loaded to {purpose} ({first_line(error)})"
            raise UnsupportedError(f"{line}; {remedy}" if remedy else line) from None
    return live.to(device).eval()
