"""The check that runs before any weight is read: would plain transformers load what the plan promises?

transformers' own loader is asked, with tensors that have shapes but no data. So the renames and merges that it does
while loading (mixture-of-experts weights, say) are taken into account without Rehead knowing any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rehead.checkpoints.source import torch_dtype
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class


@dataclass(frozen=True)
class LoadReport:
    """What transformers' loader said: names that are missing, unexpected or of another shape."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]

    def beyond(self, other: LoadReport) -> LoadReport:
        """What is here and not in ``other``."""
        return LoadReport(
            self.missing - other.missing, self.unexpected - other.unexpected, self.mismatched - other.mismatched
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def body(self, base_model_prefix: str) -> LoadReport:
        """What no model can do without: all that is missing but an output head, and what is of another shape."""
        missing = (name for name in self.missing if name.startswith(f"{base_model_prefix}."))
        return LoadReport(frozenset(missing), frozenset(), self.mismatched)

    def line(self) -> str:
        """One line naming the first trouble of each kind."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        return "; ".join(f"{len(names)} {kind} ({sorted(names)[0]})" for kind, names in kinds if names)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; errors still raise."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_report(config: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> LoadReport:
    """Let transformers load a checkpoint of these tensors on the meta device.

    Args:
        config: the resolved config of the checkpoint.
        tensors: (safetensors dtype code, shape) by name.

    Raises:
        UnsupportedError: the class refuses the config or the loader fails outright.
    """
    shapes = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta") for name, (dtype, shape) in tensors.items()
    }
    model_class = causal_lm_class(config)
    with quiet_transformers():
        try:
            loaded: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            raise UnsupportedError(
                f"{model_class.__name__} cannot be built from the planned config ({first_line(error)}); "
                "choose another number of KV heads or report the model"
            ) from None
    info = loaded[1]
    return LoadReport(
        frozenset(info["missing_keys"]),
        frozenset(info["unexpected_keys"]),
        frozenset(entry[0] for entry in info["mismatched_keys"]),
    )


def check_loads(
    source_config: Any, source_tensors: Mapping[str, Any], config: Any, tensors: Mapping[str, Any]
) -> LoadReport:
    """Require that the planned checkpoint loads as well as the source does.

    A source may itself carry tensors that its class ignores (old buffers, say), or lack a head (a base model); what the
    loader says of those is no fault of the plan's. Anything beyond that is.

    Returns:
        What the loader says of the plan, and said of the source.

    Raises:
        UnsupportedError: the target class would miss, ignore or refuse a planned tensor, or does so with the source's.
    """
    found = load_report(config, tensors)
    extra = found.beyond(load_report(source_config, source_tensors)) if found else found
    if extra:
        raise UnsupportedError(
            f"{causal_lm_class(config).__name__} would not load the planned checkpoint: {extra.line()}; "
            "please report this model"
        )
    model_class = causal_lm_class(config)
    if broken := found.body(model_class.base_model_prefix):
        raise UnsupportedError(
            f"the checkpoint is not whole, or its config.json belongs to another: of {model_class.__name__}'s tensors "
            f"{broken.line()}; fetch it again"
        )
    return found
