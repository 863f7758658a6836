"""AdamW over the trained weights: its groups, its state by name, and a step that a NaN does not get through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.selection import parameter_groups
from rehead.recipes.training.weights import Weights

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused on a GPU.

    A step whose loss or gradient is not finite moves nothing, nor does any after it. Where the kernel is fused it looks
    at a flag on the device, so that the host need not wait for each step's gradient norm.

    Args:
        weights: what trains.
        options: rates, betas, epsilon, weight decay and clipping are read.
        fused: whether the kernel is fused; on a GPU when None.

    Attributes:
        waits: whether :meth:`step` has to look at the norm on the host.
    """

    def __init__(self, weights: Weights, options: UptrainOptions, fused: bool | None = None) -> None:
        self._weights, self._clip = weights, options.clip
        groups = parameter_groups(weights.tensors, options.learning_rate, options.learning_rates, options.weight_decay)
        for group in groups:
            group.pop("names")
        first = next(iter(weights.tensors.values()))
        fused = first.device.type == "cuda" if fused is None else fused
        self._sharded = hasattr(first, "device_mesh")
        self.waits = not fused or self._sharded
        self._adam = torch.optim.AdamW(groups, betas=options.betas, eps=options.epsilon, fused=fused, foreach=not fused)
        self._broken = torch.zeros((), device=first.device)
        for tensor in weights.tensors.values():
            # Made here rather than in the first step, so that a resumed run finds it in the same place.
            count = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
            self._adam.state[tensor] = {"step": count, **{name: torch.zeros_like(tensor) for name in _MOMENTS}}

    def step(self, factor: float, loss: Tensor) -> Tensor:
        """Clip, move the weights, publish them and forget the gradients.

        Args:
            factor: of every group's peak rate.
            loss: scalar; the step counts only if it is finite.

        Returns:
            The gradient's norm before clipping, a float32 scalar; NaN or infinite where nothing moved.
        """
        gradients = self._weights.gradients()
        norm: Any = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(list(self._weights.tensors.values()), self._clip, norm, foreach=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * factor
        broken = ~(torch.isfinite(norm) & torch.isfinite(loss.to(norm.device)))
        if self.waits:
            if bool(broken):
                self._weights.clear()
                return norm
        else:
            self._broken = torch.maximum(self._broken, broken.float())
            self._adam.found_inf = self._broken  # type: ignore[attr-defined]
        self._adam.step()
        self._weights.publish()
        self._weights.clear()
        return norm

    def rate(self) -> float:
        """The highest learning rate of the last step."""
        return max(float(group["lr"]) for group in self._adam.param_groups)

    def state(self) -> dict[str, Tensor]:
        """The moments by ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, to be saved or filled in place."""
        return {
            f"{name}.{moment}": self._adam.state[tensor][moment]
            for moment in _MOMENTS
            for name, tensor in self._weights.tensors.items()
        }

    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""
        for state in self._adam.state.values():
            state["step"].fill_(step)
