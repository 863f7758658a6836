"""Find the layers of a live transformers model, and record which variant is applied to each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError


@dataclass(eq=False)
class LayerState:
    """The state of one layer of a live model while a variant is applied; read on every forward pass.

    Attributes:
        name: the changed module's name: an attention module, or a whole block.
        index: index of the decoder layer that it is or belongs to; None outside all of them.
        module: the name of its class.
        was, now: what it computes without and with the variant: an attention implementation, a block's form.
        how: the way it was changed (``"interface"``, ``"adapter"``, ``"redirected"``, ``"fused"``).
        enabled: False while the layer computes its original function.
        options: the variant's options.
        tensors: the variant's own tensors in this layer, by name; they may be trained.
        calls: how often the changed layer ran; runs inside a compiled graph are not counted.
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
        """Count one call, but not in a compiled graph: changing a number there would make torch compile again."""
        if not torch.compiler.is_compiling():
            self.calls += 1


def enclosing_layer(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Name and index of the layer that contains the module ``name``: its entry in the innermost ``ModuleList``."""
    path = name.split(".")
    for end in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[:end])), nn.ModuleList):
            return ".".join(path[: end + 1]), int(path[end])
    return None


def decoder_layers(model: Any) -> nn.ModuleList:
    """A model's decoder layers: the ``ModuleList`` of the config's length, the one with most weights if several.

    If none has that length, the longest ``ModuleList`` that is not inside another.

    Raises:
        UnsupportedError: there is none.
    """
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = [module for module in lists.values() if len(module) == count]
    if fitting:
        return max(fitting, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise UnsupportedError(
            f"{config.model_type}: its layers cannot be found, which --damage, --compile, --joint-layers and sharding "
            "need; leave those out"
        )
    return max(outer, key=len)
