"""The stage before the end-to-end training: windows of neighbouring layers are fitted to the teacher's hidden states.

A layer-wise fit makes each converted layer do what the original did; a window of layers may also share out among itself
what one layer alone cannot do. The student's own prefix is run in front of each window, so a window learns to take back
what the prefix has drifted by, and no layer behind it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rehead.data.store import Rows, TokenStore
from rehead.errors import UsageError
from rehead.models.live import decoder_layers
from rehead.models.watch import until_after
from rehead.recipes.training.log import RunLog
from rehead.recipes.training.losses.head import transformer
from rehead.recipes.training.optimizer import Optimizer, Weights, rate_factor
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes
from rehead.recipes.training.texts import first_micro_batch, forward_inputs, rows_to_train

_SMALL = 1e-12
_ORDER = 0x70696E74  # so that this stage sees other rows than the training behind it


def fit_windows(
    student: nn.Module,
    teacher: nn.Module | None,
    store: TokenStore,
    options: UptrainOptions,
    run: Processes,
    log: RunLog,
    progress: Callable[[str, float, float], None] | None = None,
) -> None:
    """Fit the student's layers, window by window from the first on; a window that comes out no nearer is put back.

    Args:
        student: changed in place; only parameters with ``requires_grad`` are.
        teacher: of the same layers and hidden size.
        store: the tokens.
        options: ``joint_layers``, ``joint_tokens``, rates and the batch are read.
        run: the processes, each with whole parameters.
        log: a ``joint`` event for each window: relative squared error before and after.
        progress: called with ("joint fit", windows done, windows).

    Raises:
        UsageError: there is no teacher or not one of the same layers, or parameters are sharded.
    """
    if teacher is None:
        raise UsageError("--joint-layers: needs a teacher; give --teacher or leave it out")
    ours, theirs = decoder_layers(student), decoder_layers(teacher)
    if len(ours) != len(theirs):
        raise UsageError(
            f"--joint-layers: the student has {len(ours)} layers and the teacher {len(theirs)}; leave it out"
        )
    mine, other = (transformer(model).config.get_text_config(decoder=True).hidden_size for model in (student, teacher))
    if mine != other:
        raise UsageError(
            f"--joint-layers: compares hidden states, of {mine} numbers in the student and {other} in the teacher; "
            "leave it out"
        )
    if run.sharded:
        raise UsageError("--joint-layers: needs whole parameters; launch with the DDP configuration or leave it out")
    # A warm-up of so many steps is of the run's; a window, which has steps of its own, takes the same share of them.
    warmup = options.warmup / options.steps if options.warmup >= 1 else options.warmup
    stage = options.model_copy(update={"tokens": options.joint_tokens, "warmup": min(warmup, 0.5)})
    starts = range(0, len(ours), options.joint_layers)
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    for done, first in enumerate(starts):
        last = min(first + options.joint_layers, len(ours)) - 1
        inside = {id(p) for layer in list(ours)[first : last + 1] for p in layer.parameters()}
        chosen = {name: parameter for name, parameter in trained.items() if id(parameter) in inside}
        if chosen:
            with _only(trained, chosen):
                window = _Window(student, teacher, ours[last], theirs[last], chosen, store, stage, run)
                log.write("joint", layers=[first, last], **window.fit())
        if progress is not None:
            progress("joint fit", done + 1, len(starts))


class _Window:
    """One window being fitted."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layer: nn.Module,
        target: nn.Module,
        chosen: dict[str, nn.Parameter],
        store: TokenStore,
        options: UptrainOptions,
        run: Processes,
    ) -> None:
        self._models = (student, layer), (teacher, target)
        self._chosen, self._store, self._options, self._run = chosen, store, options, run
        self._micro = first_micro_batch(options, run)

    def fit(self) -> dict[str, Any]:
        before = {name: parameter.detach().clone() for name, parameter in self._chosen.items()}
        weights = Weights(self._chosen)
        optimizer = Optimizer(weights, self._options.model_copy(update={"learning_rates": {}}))
        start = self._measure()
        for step in range(self._options.steps):
            error = self._pass(self._rows(step), weights)
            self._run.sum_gradients(weights.gradients())
            optimizer.step(rate_factor(step, self._options), self._run.sum(error))
        end = self._measure()
        kept = end < start
        if not kept:
            with torch.no_grad():
                for name, parameter in self._chosen.items():
                    parameter.copy_(before[name])
        return {"error_before": start, "error_after": end, "kept": kept}

    def _rows(self, step: int) -> Rows:
        options, run = self._options, self._run
        share = options.rows_per_step // run.world
        part = slice(run.rank * share, (run.rank + 1) * share)
        return rows_to_train(self._store, options, step, options.seed ^ _ORDER, part)

    def _measure(self) -> float:
        """Relative squared error on the rows behind those that are trained on."""
        with torch.no_grad():
            return float(self._run.sum(self._pass(self._rows(self._options.steps), None)))

    def _pass(self, rows: Rows, weights: Weights | None) -> Tensor:
        """Mean relative squared error over all tokens of a step, this process's part of it; backward with weights."""
        total = torch.zeros((), device=self._run.device)
        count = rows.input_ids.numel() * self._run.world
        for at in range(0, len(rows.input_ids), self._micro):
            inputs = forward_inputs(Rows(*(part[at : at + self._micro] for part in rows)), self._run.device)
            inputs = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
            (student, layer), (teacher, target) = self._models
            with torch.no_grad():
                wanted = _output_of(teacher, target, inputs).flatten(0, -2).float()
            found = _output_of(student, layer, inputs).flatten(0, -2).float()
            # Over each token's own norm, so that the few tokens with enormous hidden states are not all that counts.
            sizes = wanted.square().sum(-1).clamp_min(_SMALL)
            error = ((found - wanted).square().sum(-1) / sizes).sum() / count
            if weights is not None:
                error.backward()
                weights.collect()
            total += error.detach()
        return total


def _output_of(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states behind a layer, [B, S, hidden]; nothing behind that is computed."""
    from rehead.recipes.training.losses.head import base_model

    outputs: list[Any] = []
    with until_after(layer, outputs.append):
        base_model(model)(**inputs, use_cache=False)
    (output,) = outputs
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _only(trained: dict[str, nn.Parameter], chosen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let only some of the trained parameters train, so that no graph is kept of what lies before them."""
    try:
        for name, parameter in trained.items():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for parameter in trained.values():
            parameter.requires_grad_(True)
