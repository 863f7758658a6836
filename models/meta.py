"""Check, before any weight is read, that plain transformers would load the planned checkpoint.

transformers' own loader runs on tensors that have shapes but no data. So renames and merges that it does while loading
(of mixture-of-experts weights, say) are covered without Rehead knowing them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.source import Source, TensorInfo, torch_dtype
from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.lazy import late
from rehead.models.config import causal_lm_class
from rehead.models.families.known import KnownConfig

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")


@dataclass(frozen=True)
class LoadReport:
    """What transformers' loader reported.

    Attributes:
        missing: tensors of the class that the checkpoint lacks.
        unexpected: tensors that the class lacks, except those it is known to ignore; named after the loader's renames.
        mismatched: tensors of another shape.
        ignored: tensors that the loader did not read, by the checkpoint's names; draft layers and old buffers too.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]
    ignored: frozenset[str] = frozenset()

    def beyond(self, other: LoadReport) -> LoadReport:
        """The entries that are not in ``other``."""
        return LoadReport(
            self.missing - other.missing, self.unexpected - other.unexpected, self.mismatched - other.mismatched
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def body(self, base_model_prefix: str) -> LoadReport:
        """The entries without which no model works: missing tensors except an output head, and mismatched ones."""
        missing = (name for name in self.missing if name.startswith(f"{base_model_prefix}."))
        return LoadReport(frozenset(missing), frozenset(), self.mismatched)

    def line(self) -> str:
        """One line with the number of entries of each kind and the first of them."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched))
        return "; ".join(f"{len(names)} {kind} ({sorted(names)[0]})" for kind, names in kinds if names)


@cache
def _listed() -> Any:
    """The class of a tensor without data that records whether the loader reads it.

    The report of the loader leaves out tensors that a class is known to ignore, and uses the names of the class.
    """

    class Listed(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
        label: str
        read: set[str]

        @classmethod
        def of(cls, name: str, dtype: str, shape: tuple[int, ...], read: set[str]) -> Listed:
            tensor = torch.empty(shape, dtype=torch_dtype(dtype), device="meta").as_subclass(cls)
            tensor.label, tensor.read = name, read
            return tensor

        def __getitem__(self, index: Any) -> Any:
            self.read.add(self.label)
            return self.as_subclass(torch.Tensor)[index]

    return Listed


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype code, shape) by name, as :func:`load_report` takes them."""
    return {name: (info.dtype, info.shape) for name, info in tensors.items()}


def load_report(config: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> LoadReport:
    """transformers' report on loading a checkpoint of these tensors, on the meta device.

    Args:
        config: the resolved config of the checkpoint.
        tensors: (safetensors dtype code, shape) by name.

    Raises:
        UnsupportedError: the class refuses the config or the loader fails outright.
    """
    if _known_to_load(config, tensors):
        return LoadReport(frozenset(), frozenset(), frozenset())
    config = config.real() if isinstance(config, KnownConfig) else config
    read: set[str] = set()
    shapes = {name: _listed().of(name, dtype, shape, read) for name, (dtype, shape) in tensors.items()}
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


def _known_to_load(config: Any, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether the record of the class says that these are exactly its tensors."""
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return isinstance(config, KnownConfig) and config.known.holds(shapes, config)


def draft_layers(source: Source) -> list[str]:
    """Prefixes of layers that the class does not load, such as those that draft further tokens."""
    starts = {name: match[0] for name in source.stored if (match := re.match(r".*?\.\d+(?=\.)", name))}
    loaded = {starts[name] for name in source.tensors if name in starts}
    whole = {starts[name] for name, info in source.ignored.items() if name in starts and len(info.shape) > 1}
    return sorted(whole - loaded)


def drop_drafts(source: Source) -> list[str]:
    """Take all that only drafts tokens out of a source: those layers, and what stands beside them (``mtp.fc``).

    Returns:
        The names of the tensors that are gone.
    """
    roots = {prefix.split(".")[0] for prefix in draft_layers(source)}
    roots -= {name.split(".")[0] for name in source.tensors}
    starts = tuple(f"{start}." for start in (*draft_layers(source), *roots))
    dropped = [name for name in source.ignored if name.startswith(starts)] if starts else []
    for name in dropped:
        del source.ignored[name]
    return dropped


def without_drafts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config that announces no layers that draft tokens."""
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
    return {**raw, **{key: 0 for key in keys if raw.get(key)}}


def check_loads(
    source_config: Any, source_tensors: Mapping[str, Any], config: Any, tensors: Mapping[str, Any]
) -> LoadReport:
    """The loader's report on the planned checkpoint, which must load as well as the source does.

    A source may itself have tensors that its class ignores (old buffers, say), or lack a head (a base model). The plan
    is blamed only for what the source's report does not contain.

    Raises:
        UnsupportedError: the target class would miss, ignore or refuse a planned tensor, or does so with the source's.
    """
    report = load_report(config, tensors)
    extra = report.beyond(load_report(source_config, source_tensors)) if report else report
    if extra:
        raise UnsupportedError(
            f"{causal_lm_class(config).__name__} would not load the planned checkpoint: {extra.line()}; "
            "please report this model"
        )
    if not report:
        return report
    model_class = causal_lm_class(config)
    if broken := report.body(model_class.base_model_prefix):
        raise UnsupportedError(
            f"the checkpoint is not whole, or its config.json belongs to another: of {model_class.__name__}'s tensors "
            f"{broken.line()}; fetch it again"
        )
    return report
