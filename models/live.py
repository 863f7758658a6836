"""The layers of a live transformers model, whatever it calls them, and what is being done to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError


@dataclass(eq=False)
class LayerState:
    """What is being done to one layer of a live model while a variant is applied; read on every forward pass.

    Attributes:
        name: of the module that computes something else now: an attention module, or a whole block.
        index: of the decoder layer that it is or belongs to; None where it is in none.
        module: its class.
        was, now: what it computes without and with the variant: an attention implementation, a block's form.
        how: the way it was changed (``"interface"``, ``"adapter"``, ``"redirected"``, ``"fused"``).
        enabled: False while the layer shall compute what it did before.
        options: of the variant.
        tensors: the variant's own in this layer, by name; they may be trained.
        calls: times that it ran; a compiled graph does not count.
    """

    name: str
    index: int | None
    module: str
    was: str
    now: str
    how: str = ""
    enabled: bool = True
    options: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def count(self) -> None:
        """One more call. Not in a compiled graph, which writing to a counter would make compile anew."""
        if not torch.compiler.is_compiling():
            self.calls += 1


def enclosing_layer(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Name and index of the layer that holds the module ``name``: of the innermost list of modules on its way."""
    path = name.split(".")
    for end in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[:end])), nn.ModuleList):
            return ".".join(path[: end + 1]), int(path[end])
    return None


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a model's decoder layers: as long as its config says, and the heaviest of those that are.

    Where none is that long, the longest ``ModuleList`` that lies in no other.

    Raises:
        UnsupportedError: there is none.
    """
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [module for module in lists.values() if len(module) == count]
    if fitting:
        return max(fitting, key=lambda found: sum(parameter.numel() for parameter in found.parameters()))
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise UnsupportedError(
            f"{config.model_type}: its layers cannot be found, which --damage, --compile, --joint-layers and sharding "
            "need; leave those out"
        )
    return max(outer, key=len)
