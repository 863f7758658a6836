"""The check that runs before any weight is read: would plain transformers load what the plan promises?

transformers' own loader is asked, with tensors that have shapes but no data. So the renames and merges that it does
while loading (mixture-of-experts weights, say) are taken into account without Rehead knowing any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rehead.checkpoints.source import Source, TensorInfo, torch_dtype
from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class


@dataclass(frozen=True)
class LoadReport:
    """What transformers' loader said.

    Attributes:
        missing: names that the class has and the checkpoint has not.
        unexpected: names that the class does not have, but for those that it is known to ignore; renamed as it does.
        mismatched: names of another shape.
        ignored: every tensor that it did not read, by the checkpoint's name: draft layers and old buffers too.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]
    ignored: frozenset[str] = frozenset()

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


class _Listed(torch.Tensor):
    """A tensor without data that notes when the loader reads it: its own words leave out what a class is known to
    ignore, and have the names that it gives tensors, not the checkpoint's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    label: str
    read: set[str]

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], read: set[str]) -> _Listed:
        tensor = torch.empty(shape, dtype=torch_dtype(dtype), device="meta").as_subclass(cls)
        tensor.label, tensor.read = name, read
        return tensor

    def __getitem__(self, index: Any) -> Any:
        self.read.add(self.label)
        return self.as_subclass(torch.Tensor)[index]


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype code, shape) by name, as :func:`load_report` takes them."""
    return {name: (info.dtype, info.shape) for name, info in tensors.items()}


def load_report(config: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> LoadReport:
    """Let transformers load a checkpoint of these tensors on the meta device.

    Args:
        config: the resolved config of the checkpoint.
        tensors: (safetensors dtype code, shape) by name.

    Raises:
        UnsupportedError: the class refuses the config or the loader fails outright.
    """
    read: set[str] = set()
    shapes = {name: _Listed.of(name, dtype, shape, read) for name, (dtype, shape) in tensors.items()}
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
                f"{model_class.__name__} cannot be built from its config ({first_line(error)}); "
                "check config.json, or choose another number of KV heads"
            ) from None
    info = loaded[1]
    return LoadReport(
        frozenset(info["missing_keys"]),
        frozenset(info["unexpected_keys"]),
        frozenset(entry[0] for entry in info["mismatched_keys"]),
        frozenset(tensors.keys() - read),
    )


def draft_layers(source: Source) -> list[str]:
    """Layers that the class does not load, by their prefix: heads of their own that draft further tokens, say."""
    starts = {name: match[0] for name in source.stored if (match := re.match(r".*?\.\d+(?=\.)", name))}
    loaded = {starts[name] for name in source.tensors if name in starts}
    whole = {starts[name] for name, info in source.ignored.items() if name in starts and len(info.shape) > 1}
    return sorted(whole - loaded)


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
