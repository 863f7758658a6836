"""What trains and how it moves: parameters chosen, float32 masters, AdamW, and the learning rate over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UsageError, unknown_name
from rehead.recipes.training import eight_bit
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.rate import peak_rate

_MOMENTS = ("exp_avg", "exp_avg_sq")

#: What the words of ``--train`` mean, as regular expressions on parameter names.
PARTS = {
    "all": r"",
    "attention": r"(^|\.)((self_|linear_)?attn|(self_|linear_)?attention|self_attn\w*|attn\w*)\."
    r"|\.(mixer|temporal_block)\.[qkvo]_proj\.",
    "mlp": r"(^|\.)(mlp|mlp_block|shared_mlp|ffn|feed_forward|block_sparse_moe|experts|shared_expert\w*|fc1|fc2)\.",
    "norms": r"(norm\w*|ln_\w+|layernorm\w*)\.(weight|bias)$",
    "embeddings": r"(^|\.)(embed_\w+|wte|wpe|word_embeddings|embeddings|lm_head)\.",
}


def choose(model: nn.Module, train: str) -> list[str]:
    """Let the chosen parameters train and freeze the others.

    Args:
        model: changed in place (``requires_grad``).
        train: words of :data:`PARTS` or regular expressions, joined by commas; a parameter that any of them finds
            trains.

    Returns:
        The names of what trains.

    Raises:
        UsageError: one of them finds nothing.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    chosen: set[str] = set()
    for part in (part.strip() for part in train.split(",")):
        found = {name for name in names if re.search(PARTS.get(part, part), name)}
        if not found:
            known = f"; {unknown_name('part', part, PARTS)}" if part.isalpha() and part not in PARTS else ""
            raise UsageError(f"--train {part}: no parameter of {type(model).__name__} is called so{known}")
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


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


def parameter_groups(
    trained: Mapping[str, Any], learning_rate: float, factors: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: one for each learning rate and weight decay.

    Args:
        trained: tensors by parameter name.
        learning_rate: peak rate.
        factors: by regular expression on names; the first that finds a name counts.
        weight_decay: of matrices; vectors (norms, biases) have none.

    Returns:
        Dicts with ``params``, ``names``, ``lr``, ``peak`` (the same, kept) and ``weight_decay``.

    Raises:
        UsageError: an expression finds no parameter that trains.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, tensor in trained.items():
        pattern = next((pattern for pattern in factors if re.search(pattern, name)), None)
        factor = 1.0 if pattern is None else factors[pattern]
        if pattern is not None:
            used.add(pattern)
        rate, decay = learning_rate * factor, weight_decay if tensor.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "peak": rate})
        group["weight_decay"] = decay
        group["params"].append(tensor)
        group["names"].append(name)
    idle = [pattern for pattern in factors if pattern not in used]
    if idle:
        raise UsageError(f"--lr-for {idle[0]}: no parameter that trains is called so; check the name or --train")
    return list(groups.values())


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused on a GPU; or with moments in 8 bits, by torchao.

    A step whose loss or gradient is not finite moves nothing, nor does any after it. Where the kernel is fused it looks
    at a flag on the device, so that the host need not wait for each step's gradient norm.

    Args:
        weights: what trains.
        options: rates, betas, epsilon, weight decay and clipping are read; without a learning rate, the default of a
            run that has no teacher is taken.
        fused: whether the kernel is fused; on a GPU when None.

    Attributes:
        waits: whether :meth:`step` has to look at the norm on the host.
    """

    def __init__(self, weights: Weights, options: UptrainOptions, fused: bool | None = None) -> None:
        self._weights, self._clip = weights, options.clip
        peak = peak_rate(options)
        groups = parameter_groups(weights.tensors, peak, options.learning_rates, options.weight_decay)
        for group in groups:
            group.pop("names")
        first = next(iter(weights.tensors.values()))
        fused = first.device.type == "cuda" if fused is None else fused
        self._sharded = hasattr(first, "device_mesh")
        self._broken = torch.zeros((), device=first.device)
        self._adam: torch.optim.Optimizer
        if options.optimizer == "adamw-8bit":
            if self._sharded:
                raise UsageError(
                    "--optimizer adamw-8bit: needs whole parameters; launch with the DDP configuration or leave it out"
                )
            self.waits = True
            self._adam = eight_bit.adamw(groups, options.betas, options.epsilon)
            return
        self.waits = not fused or self._sharded
        self._adam = torch.optim.AdamW(groups, betas=options.betas, eps=options.epsilon, fused=fused, foreach=not fused)
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
            if isinstance(group["lr"], Tensor):  # which a compiled step reads
                group["lr"].fill_(group["peak"] * factor)
            else:
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
        """The moments by ``NAME.exp_avg`` and ``NAME.exp_avg_sq``, to be saved or filled in place; in 8 bits as codes
        and scales."""
        return {
            f"{name}.{moment}{part}": value
            for moment in _MOMENTS
            for name, tensor in self._weights.tensors.items()
            for part, value in eight_bit.tensors_of(self._adam.state[tensor][moment]).items()
        }

    def set_step(self, step: int) -> None:
        """Say how many steps the moments have seen."""
        for state in self._adam.state.values():
            state["step"].fill_(step)


def rate_factor(step: int, options: UptrainOptions) -> float:
    """Linear warm-up, then cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), warmup-stable-decay (Hu et al. 2024,
    arXiv 2404.06395; linear decay) or constant.

    Args:
        step: from 0; the last step ends one step above the final rate, so that no step is wasted.
        options: ``steps``, ``schedule``, ``warmup``, ``decay`` and ``final_learning_rate`` are read.
    """
    steps, end = options.steps, options.final_learning_rate
    warmup = int(options.warmup) if options.warmup >= 1 else round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "wsd":
        length = max(round(options.decay * steps), 1)
        return end + (1 - end) * min(1.0, (steps - step) / length)
    progress = (step - warmup) / max(steps - warmup, 1)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
