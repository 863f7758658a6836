"""The decoder layers of a live transformers model, whatever it calls them."""

from __future__ import annotations

from torch import nn

from rehead.errors import UnsupportedError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest ``ModuleList`` that lies in no other.

    Raises:
        UnsupportedError: there is none.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    if not found:
        raise UnsupportedError(f"{type(model).__name__}: has no list of layers; sharding, compiling and joint need one")
    return max((module for _, module in found), key=len)
