"""Healing a layer whose block has changed its form: what writes to the residual stream, refitted in closed form.

In a parallel block the attention's output projection and the FFN's read inputs that do not depend on either, so both
together are one linear least-squares problem; in a serial one the FFN's follows the attention's, which is refitted by
itself first. What is matched is the original block's output, whatever the converted layers before it have drifted by.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rehead.models.heads import Heads
from rehead.models.linalg import ridge

if TYPE_CHECKING:
    from rehead.healing.layer import LayerHealer

_RIDGE = 1e-4


class WriterRefit:
    """Normal equations of some matrices whose outputs are added up.

    Args:
        weights: [m, w] each; bias: their biases' sum [m], or None where none has one.
    """

    def __init__(self, weights: list[Tensor], bias: Tensor | None) -> None:
        self.widths = [weight.shape[1] for weight in weights]
        self.bias = bias is not None
        columns = [*weights, bias[:, None]] if bias is not None else weights
        self.prior = torch.cat([column.float() for column in columns], 1)
        width = self.prior.shape[1]
        self.gram = torch.zeros(width, width, device=self.prior.device)
        self.cross = torch.zeros_like(self.prior)
        self.size = 0.0

    def add(self, inputs: list[Tensor], target: Tensor) -> None:
        """Count a batch: the matrices' inputs [b, S, w] each, and what they should add up to [b, S, m]."""
        z, y = torch.cat([part.flatten(0, 1) for part in inputs], 1), target.flatten(0, 1)
        if self.bias:
            z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        self.gram += z.T @ z
        self.cross += y.T @ z
        self.size += float(y.square().sum())

    def error(self, weight: Tensor) -> float:
        """Relative error of the sum under weights [m, all the inputs]."""
        lost = self.size - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return max(float(lost) / max(self.size, 1e-30), 0.0) ** 0.5

    def solve(self) -> tuple[list[Tensor], Tensor | None, list[float]]:
        """(the weights, their biases' sum, relative error before and after)."""
        best = ridge(self.gram, self.cross, self.prior, _RIDGE).to(self.prior)
        parts = list(best[:, : sum(self.widths)].split(self.widths, 1))
        return parts, best[:, -1] if self.bias else None, [self.error(self.prior), self.error(best)]


def refit_writers(
    healer: LayerHealer, layer: int, pooled: Heads, ours: list[Tensor], after: list[Tensor]
) -> tuple[Heads, dict[str, Tensor], list[float]]:
    """Refit what a changed block writes.

    Args:
        healer: holds the two models.
        pooled: the layer's heads.
        ours: the converted prefix's hidden states before the layer [N, S, n], for each length of sequence.
        after: the original's after it.

    Returns:
        (heads with the new output projection, the FFN's new output matrix by the checkpoint's names, relative error of
        what the refitted matrices give before and after).
    """
    model, plan = healer.model, healer.plan
    stem = plan.ffn_writer(layer)
    assert stem is not None, "the plan has refused a layer without one"
    healer.load_converted(layer, pooled)
    block = healer.converted.layers[layer]
    output = block.get_submodule(model.family.attention + model.family.names.output)
    writer = block.get_submodule(stem)
    joint = layer in plan.parallel_layers
    modules: list[Any] = [output, writer] if joint else [writer]
    biases = [module.bias for module in modules if module.bias is not None]
    refit = WriterRefit([module.weight for module in modules], torch.stack(biases).sum(0) if biases else None)
    scale = model.family.residual_scale(model.config, layer)
    for index, rows in healer.every_batch(ours):
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(
            module: nn.Module, args: tuple[Tensor, ...], result: Tensor, seen: dict[nn.Module, Any] = seen
        ) -> None:
            seen[module] = (args[0], result.clone())  # Falcon adds to it in place

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(keep).remove)
            out = healer.converted.run_layer(layer, ours[index][rows].to(healer.device))
        flat = [(x.reshape(*out.shape[:2], -1), y.reshape(out.shape)) for x, y in (seen[m] for m in modules)]
        target = (after[index][rows].to(healer.device) - out) / scale + sum(y for _, y in flat)
        refit.add([x for x, _ in flat], target)
    weights, bias, errors = refit.solve()
    extra = _ffn_tensors(
        model.family.layer.format(i=layer) + stem, weights[-1], bias, writer, output if joint else None
    )
    healer.converted.unload_layer(layer)
    if joint:
        pooled = replace(pooled, o=weights[0].unflatten(1, (pooled.num_heads, -1)).contiguous())
        if bias is not None and writer.bias is None:
            pooled = replace(pooled, o_bias=bias)
    return pooled, extra, errors


def _ffn_tensors(name: str, weight: Tensor, bias: Tensor | None, writer: Any, output: Any | None) -> dict[str, Tensor]:
    """The FFN's output matrix; of two biases that are added up, its own takes the change."""
    tensors = {f"{name}.weight": weight.contiguous()}
    if writer.bias is not None and bias is not None:
        other = 0 if output is None or output.bias is None else output.bias
        tensors[f"{name}.bias"] = (bias - other).clone()
    return tensors
