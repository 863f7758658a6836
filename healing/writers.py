"""Closed-form refit of the matrices that write to the residual stream, by ridge regression on their inputs.

For fixed attention probabilities, the attention's output is linear in the output projection. In a parallel block the
inputs of the output projection and of the FFN's last matrix depend on neither, so both together are one least-squares
problem. The target is the original's output and, where the block adds straight to the residual stream, the error of
the changed layers before, so that each layer also corrects some of their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rehead.healing.runner import Rows, Runner, TextState
from rehead.models.device_memory import empty_beside
from rehead.models.linalg import fast_products, ridge
from rehead.models.ranks import Ranks
from rehead.models.watch import hooked, until

#: Pull towards the matrices as they are, relative to the mean diagonal of the normal equations.
RIDGE = 1e-4


class LeastSquares:
    """The least-squares problem for some matrices whose outputs are added up, as normal equations.

    Args:
        weights: the matrices, [m, w] each.
        bias: the sum [m] of their biases, or None if there are none.
    """

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None = None) -> None:
        self.widths = [weight.shape[1] for weight in weights]
        self.bias = bias is not None
        columns = [*weights, bias[:, None]] if bias is not None else [*weights]
        self.prior = torch.cat([column.float() for column in columns], 1)
        width = self.prior.shape[1]
        self.gram = torch.zeros(width, width, device=self.prior.device)
        self.cross = torch.zeros_like(self.prior)
        self.size = torch.zeros((), dtype=torch.float64, device=self.prior.device)

    def add(self, inputs: Sequence[Tensor], target: Tensor) -> None:
        """Add a batch: the matrices' inputs [b, S, w] each, and the target [b, S, m] for their outputs' sum."""
        z, y = torch.cat([part.flatten(0, 1) for part in inputs], 1), target.flatten(0, 1)
        if self.bias:
            z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        self.gram += z.T @ z
        self.cross += y.T @ z
        self.size += y.square().sum()

    def share(self, ranks: Ranks) -> None:
        """Make the sums those of all processes."""
        for part in (self.gram, self.cross, self.size):
            ranks.sum(part)

    def error(self, weight: Tensor) -> float:
        """Relative error of the outputs' sum with all weights side by side in ``weight`` [m, sum of w]."""
        size = float(self.size)
        lost = size - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return max(float(lost) / max(size, 1e-30), 0.0) ** 0.5

    def solve(self, strength: float = RIDGE) -> tuple[list[Tensor], Tensor | None, list[float]]:
        """(the weights, the sum of their biases, relative error before and after)."""
        best = ridge(self.gram, self.cross, self.prior, strength).to(self.prior)
        parts = list(best[:, : sum(self.widths)].split(self.widths, 1))
        return parts, best[:, -1] if self.bias else None, [self.error(self.prior), self.error(best)]


@dataclass
class OutputTarget:
    """The target of the changed layer's attention output.

    Attributes:
        clean: the original's attention output [N, S, m], for each length of sequence.
        drift: the error of the changed layers before, in the output's scale and of the same shapes; None where a norm
            is between the output and the residual stream.
    """

    clean: list[Tensor]
    drift: list[Tensor] | None

    def at(self, index: int, rows: Rows, share: float, device: torch.device) -> Tensor:
        """The targets of some sequences of one length, which correct ``share`` of the drift."""
        wanted = self.clean[index][rows].to(device)
        return wanted if self.drift is None else wanted + share * self.drift[index][rows].to(device)

    def with_drift(self, share: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """All targets, which correct ``share`` of the drift, on a device."""
        whole = [torch.empty(part.shape, dtype=dtype, device=device) for part in self.clean]
        for index, part in enumerate(whole):
            for row in range(len(part)):
                part[row] = self.at(index, slice(row, row + 1), share, device)[0]
        return whole


def run_original(runner: Runner, layer: int, original: TextState, changed: TextState) -> OutputTarget:
    """Run the text through the original's layer; returns the target for the changed layer's attention output.

    Args:
        runner: runs the original.
        layer: the layer's index.
        original: the original's text before the layer; overwritten with that after it.
        changed: the changed model's text before the layer.
    """
    _, _, output = runner.modules(layer)
    drift = None
    if not runner.family.post_norm_of(runner.config):
        scale = runner.family.residual_scale(runner.config, layer)
        drift = [empty_beside(part) for part in original.hidden]
        for index, rows in runner.every_batch(drift):
            wanted, got = (state.hidden[index][rows].to(runner.device) for state in (original, changed))
            drift[index][rows].copy_((wanted - got) / scale)
    clean: list[Tensor | None] = [None] * len(original.hidden)
    kept: list[Tensor] = []

    def keep(index: int, rows: slice, after: Tensor) -> None:
        written = kept.pop().reshape(*after.shape[:2], -1)
        whole = original.hidden[index]
        if (part := clean[index]) is None:
            clean[index] = part = empty_beside(whole, (*whole.shape[:2], written.shape[-1]))
        part[rows].copy_(written)

    with hooked(output.register_forward_hook(lambda module, args, result: kept.append(result))):
        runner.run(layer, original, keep)
    # A process without a sequence of some length still has a place for them.
    whole = [empty_beside(part) if kept is None else kept for part, kept in zip(original.hidden, clean)]
    return OutputTarget(whole, drift)


def refit_output(
    runner: Runner, layer: int, state: TextState, target: OutputTarget
) -> tuple[dict[str, Tensor], list[float]]:
    """Refit a loaded layer's attention output projection.

    Args:
        runner: runs the changed model.
        layer: the layer's index.
        state: the changed model's text before the layer.
        target: from :func:`run_original`.

    Returns:
        (the new matrix, and its bias if there is one, by the checkpoint's names; relative error of the attention's
        output before and after).
    """
    _, _, output = runner.modules(layer)
    problem = _problem(runner, [output])
    for index, rows in runner.every_batch(state.hidden):
        wanted = target.at(index, rows, 1.0, runner.device)

        def count(args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor = wanted) -> None:
            problem.add([args[0].reshape(*wanted.shape[:-1], -1)], wanted)

        with until(output, count):
            runner.call(layer, state, index, rows)
    problem.share(runner.ranks)
    weights, bias, errors = problem.solve()
    return _named(runner, layer, [output], weights, bias), errors


def refit_writers(
    runner: Runner, layer: int, stems: Sequence[str], state: TextState, after: TextState, strength: float | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Refit together all matrices of a loaded layer's block that write to the residual stream.

    Args:
        runner: runs the changed model.
        layer: the layer's index.
        stems: names of the matrices below the layer; their inputs must not depend on one another's outputs.
        state: the changed model's text before the layer.
        after: the original's text after it.
        strength: pull towards the present matrices; :data:`RIDGE` when None.

    Returns:
        (new matrices and biases by the checkpoint's names, relative error of their output before and after).
    """
    modules = [runner.model.layers[layer].get_submodule(stem) for stem in stems]
    problem = _problem(runner, modules)
    scale = runner.family.residual_scale(runner.config, layer)
    for index, rows in runner.every_batch(state.hidden):
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(
            module: nn.Module, args: tuple[Tensor, ...], result: Tensor, seen: dict[nn.Module, Any] = seen
        ) -> None:
            seen[module] = (args[0], result.clone())  # Falcon adds to it in place

        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(hooked(module.register_forward_hook(keep)))
            out = runner.call(layer, state, index, rows)
        flat = [(x.reshape(*out.shape[:2], -1), y.reshape(out.shape)) for x, y in (seen[m] for m in modules)]
        target = (after.hidden[index][rows].to(runner.device) - out) / scale + sum(y for _, y in flat)
        with fast_products(runner.model.half):
            problem.add([x for x, _ in flat], target)
    problem.share(runner.ranks)
    weights, bias, errors = problem.solve(RIDGE if strength is None else strength)
    return _named(runner, layer, modules, weights, bias), errors


def _problem(runner: Runner, modules: Sequence[Any]) -> LeastSquares:
    biases = [module.bias for module in modules if module.bias is not None]
    weights = [module.weight.T if runner.family.transposed else module.weight for module in modules]
    return LeastSquares(weights, torch.stack(biases).sum(0) if biases else None)


def _named(
    runner: Runner, layer: int, modules: Sequence[Any], weights: Sequence[Tensor], bias: Tensor | None
) -> dict[str, Tensor]:
    """Matrices by the checkpoint's names; the change of the biases' sum goes into the last bias."""
    names = {module: name for name, module in runner.model.layers[layer].named_modules()}
    prefix, tensors = runner.family.layer.format(i=layer), {}
    for module, weight in zip(modules, weights):
        turned = weight.T if runner.family.transposed else weight
        tensors[f"{prefix}{names[module]}.weight"] = turned.contiguous()
    biased = [module for module in modules if module.bias is not None]
    if biased and bias is not None:
        rest = sum(module.bias for module in biased[:-1])
        tensors[f"{prefix}{names[biased[-1]]}.bias"] = (bias - rest).clone()
    return tensors
