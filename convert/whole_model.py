"""A checkpoint's model held whole in memory, for what has to be measured on all of it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class
from rehead.models.model import Model
from rehead.models.remote import weights_for_loading


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
    source = model.source
    source.materialise()
    place = getattr(source, "folder", None) or source.id
    with quiet_transformers():
        try:
            live: Any = causal_lm_class(model.config).from_pretrained(
                **weights_for_loading(source, place),
                config=copy.deepcopy(model.config),  # transformers' own also where a record stood for it
                revision=source.revision or "main",
                dtype=dtype,
            )
        except Exception as error:
            line = f"{source.id}: cannot be loaded to {purpose} ({first_line(error)})"
            raise UnsupportedError(f"{line}; {remedy}" if remedy else line) from None
    return live.to(device).eval()
