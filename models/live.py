"""Live models: their layers, the state of a variant on each, the device they run on, and how they are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rehead.errors import UnsupportedError, UsageError, first_line
from rehead.lazy import late

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = late("torch")


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
        if isinstance(model.get_submodule(".".join(path[:end])), torch.nn.ModuleList):
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
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
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


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode is restored after it."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def clock(device: torch.device) -> float:
    """Seconds on the clock, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        UsageError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: cannot be used ({first_line(error)}); choose cpu or auto") from None
    return device
