"""A temperature for each attention head: scores divided by a number that is learned. The example of a variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rehead.attention.call import AttentionCall
from rehead.models.heads import Heads
from rehead.models.layout import LayerLayout
from rehead.variants.contract import Compute, Variant, VariantOptions, register


class TemperatureOptions(VariantOptions):
    """Options of the variant ``temperature``."""

    start: float = Field(1.0, gt=0, description="What every head's temperature starts from; 1 changes nothing.")


def state(layer: LayerLayout, options: TemperatureOptions) -> dict[str, Tensor]:
    """A temperature for each query head, [H]."""
    return {"heads": torch.full((layer.num_heads,), options.start)}


def attend(call: AttentionCall, options: Any, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """softmax(q k / T): the query divided by its head's temperature."""
    return compute(call.with_(query=(call.query / state["heads"][:, None, None]).to(call.query.dtype)))


def weights(heads: Heads, options: TemperatureOptions, moments: Any) -> Heads:
    """The same in the weights that make the query; rotary positions pass a factor on."""
    return heads.scaled_queries(1 / options.start)


def trains(module: nn.Module) -> Iterable[nn.Parameter]:
    """The temperatures of an attention module."""
    return [parameter for name, parameter in module.named_parameters() if name.startswith("rehead_temperature_")]


TEMPERATURE = register(
    Variant(
        name="temperature", summary="a learned temperature for each attention head (approximate)",
        source="an example, see CONTRIBUTING.md", options=TemperatureOptions,
        exact=lambda options: False, off=lambda options: options.but(start=1.0),
        attend=attend, state=state, weights=weights, trains=trains,
    )
)  # fmt: skip
