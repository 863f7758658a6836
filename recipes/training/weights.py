"""What the optimiser steps: the model's own parameters, or float32 masters of parameters that compute in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Weights:
    """The trained parameters of a model, in float32 for the optimiser.

    Where parameters compute in a narrower dtype, each has a float32 master: gradients are added up in float32 over the
    micro-batches of a step, the optimiser moves the masters, and the parameters are their rounded copies. So a small
    update is never lost to rounding, and no weight is cast in any forward pass (which autocast would do).

    Args:
        parameters: what trains, by name; plain or sharded (DTensor).

    Attributes:
        tensors: what the optimiser moves, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        narrow = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
        self.tensors: dict[str, Tensor] = dict(parameters)
        for name in narrow:
            self.tensors[name] = parameters[name].detach().float()
        self._copies: list[Tensor] = [parameters[name] for name in narrow]
        self._masters = [self.tensors[name] for name in narrow]

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the masters'; call after every backward pass."""
        with torch.no_grad():
            added: tuple[list[Tensor], list[Tensor]] = ([], [])
            for copy, master in zip(self._copies, self._masters):
                if copy.grad is None:
                    continue
                if master.grad is None:
                    master.grad = copy.grad.float()
                else:
                    added[0].append(master.grad)
                    added[1].append(copy.grad)
                copy.grad = None
            if added[0]:
                torch._foreach_add_(added[0], added[1])

    def publish(self) -> None:
        """Round the masters into the parameters; call after every optimiser step."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._masters)

    def gradients(self) -> list[Tensor]:
        """The gradients of a step; zero where a parameter had no part in it."""
        for tensor in self.tensors.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return [tensor.grad for tensor in self.tensors.values() if tensor.grad is not None]

    def clear(self) -> None:
        """Forget all gradients, of an unfinished step too."""
        for tensor in (*self.tensors.values(), *self._copies):
            tensor.grad = None
