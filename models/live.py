"""The decoder layers of a live transformers model, whatever it calls them."""

from __future__ import annotations

from typing import Any

from torch import nn

from rehead.errors import UnsupportedError


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
