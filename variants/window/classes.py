"""Which class holds a model with windows: its own by its config, one that stands in for it, or a modelling file.

Each entry of the tables was tried against the patched model (``tests/variants/window/test_classes.py``). Classes that
rotate windowed layers in another way (Gemma 3, Cohere 2, EXAONE 4) cannot give a window to a layer that had none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.errors import UnsupportedError
from rehead.models.config import resolve_config
from rehead.models.families.parallel import FILE, WINDOW_PREFIX, as_derived
from rehead.models.families.spec import rope_parameters
from rehead.models.model import Model
from rehead.models.modeling import window_config, window_families
from rehead.models.rewrite import Derived, Rewrite, unchanged

if TYPE_CHECKING:
    from rehead.variants.window import WindowOptions

#: Classes whose config says layer by layer which has the window, all of one size.
BY_LAYER = (
    "cwm", "dots1", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "ministral", "olmo3", "qwen2", "qwen2_moe",
    "qwen3", "smollm3", "vaultgemma",
)  # fmt: skip
#: Classes that give every layer the window.
WHOLE = ("ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2")
#: Of both, those whose config also switches windows on.
SWITCHED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")
#: Classes with a sink logit for each head.
WITH_LOGIT = ("gpt_oss", "granite_swa", "granitemoe_swa")
#: Classes that stand in for others, the one that most engines serve first.
HOSTS = ("ministral", "qwen2", "smollm3", "cwm", "granite_swa")

SINKS = "sinks"
"""The parameter of an attention module that holds its heads' sink logits."""
OFF = -1e4
"""A logit that takes no share."""


def host_of(model: Model, options: WindowOptions, hosts: Sequence[str]) -> str | None:
    """The class that stands in for the model's own, :data:`FILE`, or None where its own holds the windows.

    Args:
        hosts: classes that may stand in for it, whatever it holds.

    Raises:
        UnsupportedError: nothing holds them; each class's reason is named.
    """
    reasons = {model.config.model_type: own_refusal(model, options)}
    if reasons[model.config.model_type] is None:
        return None
    for name in HOSTS:
        if name in hosts and (name in WITH_LOGIT or not options.sink_logit) and not options.sinks:
            return name
    if (reason := file_refusal(model)) is None:
        return FILE
    reasons[FILE] = reason
    raise UnsupportedError(f"{model.config.model_type}: " + "; ".join(f"as {k}: {v}" for k, v in reasons.items()))


def own_refusal(model: Model, options: WindowOptions) -> str | None:
    """Why a model's own class cannot hold the windows; None if it can."""
    kind = model.config.model_type
    if kind.startswith(WINDOW_PREFIX):
        sinks = model.config.sink_tokens
        if {after.sinks for after in map(options.narrowed, model.layouts) if after.window} != {options.sinks}:
            return f"its layers share {sinks} sink tokens (give --sinks {sinks})"
        return None if model.config.sink_logits or not options.sink_logit else "it was saved without sink logits"
    if options.sinks:
        return "it has no sink tokens"
    if kind not in (*BY_LAYER, *WHOLE):
        return "its config has no window"
    if options.sink_logit and kind not in WITH_LOGIT:
        return "it has no sink logit"
    windows = windows_after(model, options)
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        said = " and ".join(map(str, sorted(sizes)))
        return f"its layers share one window, which would be {said} (give --layers all, or the window of the others)"
    if kind in WHOLE and None in windows:
        return "it gives all of its layers the window or none"
    return None


def file_refusal(model: Model) -> str | None:
    """Why no modelling file of Rehead's holds a model's windows; None if one does."""
    kind = model.config.model_type
    if kind not in window_families():
        return "Rehead has no modelling file for it"
    if any(layer.window for layer in model.layouts):
        return "some of its layers have windows of their own"
    return None


def with_file(model: Model, logits: bool) -> Rewrite:
    """A model in the class of Rehead's modelling file, which computes the same: every window hides nothing yet.

    Args:
        logits: give each head a sink logit, switched off.

    Raises:
        UnsupportedError: there is no such class.
    """
    kind = model.config.model_type
    if (reason := file_refusal(model)) is not None:
        raise UnsupportedError(f"{kind}: {reason}; patch the live model instead")
    raw = window_config(model.source.config, [None] * int(model.config.num_hidden_layers), 0, logits)
    target = as_derived(replace(model.family, model_type=kind), str(raw["model_type"]))
    rewrite = unchanged("host", raw, target, model.source.tensors)
    tensors, heads = dict(rewrite.tensors), model.num_heads
    for layer in model.layers if logits else ():
        first = model.layer_tensors(layer)[0]
        tensors[f"{model.family.prefix(layer)}{SINKS}"] = Derived(
            (first,), (heads,), lambda weight: weight.new_full((heads,), OFF)
        )
    facts = {"before": kind, "after": raw["model_type"]}
    return replace(rewrite, tensors=tensors, facts=facts)


def windows_after(model: Model, options: WindowOptions) -> list[int | None]:
    """The window of every layer of the result."""
    count = int(model.config.num_hidden_layers)
    options.indices(count)  # refuses layers that there are not
    after = {layer.index: options.narrowed(layer).window for layer in model.layouts}
    return [after.get(layer) for layer in range(count)]


def config_with(model: Model, options: WindowOptions) -> dict[str, Any]:
    """The raw config of a model whose class, its own or the modelling file's, holds the windows.

    Raises:
        UnsupportedError: the class would also rotate a layer in another way.
    """
    windows = windows_after(model, options)
    raw, kind = copy.deepcopy(model.source.config), model.config.model_type
    if (reason := own_refusal(model, options)) is not None:
        raise UnsupportedError(f"{kind}: {reason}; leave --host out")
    if kind.startswith(WINDOW_PREFIX):
        return window_config(raw, windows, options.sinks, bool(model.config.sink_logits))
    raw["sliding_window"] = next(window for window in windows if window is not None)
    if kind in BY_LAYER:
        raw["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        raw.pop("max_window_layers", None)
    if kind in SWITCHED:
        raw["use_sliding_window"] = True
    _refuse_rotation(model, raw)
    return raw


def _refuse_rotation(model: Model, raw: Mapping[str, Any]) -> None:
    after, family = resolve_config(raw, model.source.id), model.family
    for layer in model.layers:
        before = family.rotary_dims(model.config, layer), rope_parameters(model.config, layer)
        if before != (family.rotary_dims(after, layer), rope_parameters(after, layer)):
            raise UnsupportedError(
                f"{model.config.model_type}: its class rotates windowed layers in another way, so layer {layer} would "
                "change more than its window; patch the live model instead"
            )
