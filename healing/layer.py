"""Change one layer on calibration text: closed form, refit of the matrices that write to the residual stream, fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.healing.fit import DRIFT, RELATIVE_RATE, fit_attention
from rehead.healing.job import Changed, Job, LayerJob
from rehead.healing.layerwise import Call
from rehead.healing.logits import LogitModel, logit_error, refit_logits
from rehead.healing.moments import Moments
from rehead.healing.runner import Rows, Runner, TextState
from rehead.healing.sight import gather_moments, geometry, logit_targets
from rehead.healing.writers import OutputTarget, refit_output, refit_writers, run_original
from rehead.models.device_memory import free_memory
from rehead.models.heads import Heads
from rehead.models.linalg import sqrt_pair
from rehead.models.ranks import Ranks
from rehead.models.watch import hooked, until

#: What a token leaves in memory on its way forward and back through an attention module, in hidden states.
_STATES = 64
#: Of the inputs' second moment before its root is taken, relative to its largest eigenvalue.
_DAMPING = 1e-4


@dataclass
class LayerRecovery:
    """Changes a model's layers one after another.

    Attributes:
        job: the models and how their layers change.
        original, changed: the two models, run over the same text.
    """

    job: Job
    original: Runner
    changed: Runner

    def change(
        self, layer: int, before: TextState, prefix: TextState, moments: Moments | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Change the layer that is loaded in ``original``; it stays loaded in ``changed`` if it was run there.

        Args:
            layer: the layer's index.
            before: the original's hidden states before the layer; overwritten with those after it.
            prefix: the changed model's hidden states before the layer.
            moments: the layer's moments; gathered on ``prefix`` when None.

        Returns:
            (new tensors by the checkpoint's names, in the form that is written; manifest entries).
        """
        job = self.job.layers[layer]
        heads = self.job.start.heads(layer).to(self.original.device, torch.float32)
        changed, inputs = Changed(heads), None
        if job.closed_form is not None:
            changed, inputs = self._closed_form(layer, job, heads, before, prefix, moments)
        weights, facts = changed.weights, changed.facts
        tensors = self.job.tensors(layer, weights) if isinstance(weights, Heads) else weights
        tensors = self.original.ranks.same(tensors) or {}
        if job.module is not None:  # the changed checkpoint computes these too
            tensors |= self._writers(layer, job)
        if not (job.refit or job.fit or job.writers):
            self.original.run(layer, before)
            return self._stored(tensors), facts
        target = run_original(self.original, layer, before, prefix)
        self.changed.model.load_layer(layer, tensors)
        fits = job.fit > 0 and inputs is not None
        if job.refit and (job.settings.refit_first or not fits):
            tensors |= self._refit(layer, prefix, target, facts)
        if fits and inputs is not None:
            moved, facts["fit_loss"] = self._fit(layer, job, inputs, prefix, target)
            tensors |= moved
            if job.refit:
                tensors |= self._refit(layer, prefix, target, facts)
        if job.writers:
            refitted, errors = refit_writers(self.changed, layer, job.writers, prefix, before, job.settings.ridge)
            tensors |= refitted
            facts["block_error"] = [round(error, 6) for error in errors]
        return self._stored(tensors), facts

    def _writers(self, layer: int, job: LayerJob) -> dict[str, Tensor]:
        """The original's matrices in ``job.writers``, which a refit will change."""
        prefix, original = self.job.original.family.layer.format(i=layer), self.job.original
        names = [f"{prefix}{stem}.{part}" for stem in job.writers for part in ("weight", "bias")]
        return {name: original.read(name, layer) for name in names if name in original.source.tensors}

    def _refit(self, layer: int, prefix: TextState, target: OutputTarget, facts: dict[str, Any]) -> dict[str, Tensor]:
        tensors, (_, error) = refit_output(self.changed, layer, prefix, target)
        self.changed.model.load_layer(layer, tensors)
        if self.job.layers[layer].module is not None:  # the other forms say what they lose in keys and values
            facts["output_error"] = round(error, 6)
        return tensors

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.job.store(name, tensor) for name, tensor in tensors.items()}

    # ---- closed form

    def _closed_form(
        self, layer: int, job: LayerJob, heads: Heads, before: TextState, prefix: TextState, moments: Moments | None
    ) -> tuple[Changed, list[Tensor] | None]:
        """(the changed layer, the inputs of its attention on the changed prefix if the fit needs them)."""
        assert job.closed_form is not None
        rotation, scaling = geometry(self.original, layer, heads, before)
        inputs = self.original.attention_inputs(layer, prefix)
        if moments is None and (job.needs or job.refit):
            state, read = prefix, inputs
            if job.settings.on_original:
                state, read = before, self.original.attention_inputs(layer, before)
            moments = gather_moments(self.original, layer, heads, state, read, job.needs, job.groups, rotation)
        changed = _of_main(job.closed_form(heads, moments), self.original.ranks)
        if job.refit and job.settings.logits and moments is not None and isinstance(changed.weights, Heads):
            if rotation is None or scaling is None:
                changed.facts["logits"] = "not refitted: not linear in the projections"
            else:
                model, moments = LogitModel(rotation, scaling, self.original.ranks), moments.of_inputs()
                targets = logit_targets(self.original, layer, before, inputs, heads.num_heads, changed.order)
                weights, errors = _with_logits(changed.weights, model, targets, moments)
                changed = Changed(weights, {**changed.facts, "logit_error": errors}, changed.order)
        return changed, inputs if job.fit else None  # as large as the hidden states: not kept for nothing

    # ---- fit

    def _fit(
        self, layer: int, job: LayerJob, inputs: list[Tensor], prefix: TextState, target: OutputTarget
    ) -> tuple[dict[str, Tensor], float]:
        """(the fitted parameters by the checkpoint's names, the fit's loss)."""
        attention, _, _ = self.changed.modules(layer)
        trained = {id(parameter) for parameter in job.trains(attention)}
        moved = {name: parameter for name, parameter in attention.named_parameters() if id(parameter) in trained}
        settings = job.settings
        drift = DRIFT if settings.drift is None else settings.drift
        back = self._whiten([moved[name] for name in settings.reads if name in moved], inputs)
        # A process may have no sequence of some length.
        forwards = {index: self._attention(layer, prefix, index) for index, part in enumerate(inputs) if len(part)}
        device = self.changed.device
        inputs, target = _brought(inputs, target, drift, device)
        half = settings.half or (self.original.model.half and not self.job.own_calls)
        counts = [self._fit_rows(part, settings.tokens) for part in inputs]
        at_once = [_at_once(count, part, half, device) for count, part in zip(counts, inputs)]
        loss = fit_attention(
            moved,
            lambda index, rows: forwards[index](inputs[index][rows].to(device, torch.float32), rows),
            lambda index, rows: target.at(index, rows, drift, device),
            job.fit,
            [(self.changed.count(part), count) for part, count in zip(inputs, counts)],
            self.job.seed + layer,
            RELATIVE_RATE if settings.rate is None else settings.rate,
            # A step that has to be taken in parts is long beside launching it.
            record=all(part.is_cuda for part in inputs + (prefix.hidden if any(prefix.carried) else []))
            and at_once == counts,
            half=half,
            at_once=at_once,
            ranks=self.changed.ranks,
        )
        if back is not None:
            for name in set(settings.reads) & set(moved):
                moved[name].data = (moved[name].data.double() @ back).float()
        stem = self.changed.family.prefix(layer)
        return {stem + name: parameter.detach().clone() for name, parameter in moved.items()}, round(loss, 6)

    def _fit_rows(self, part: Tensor, tokens: int | None) -> int:
        rows = self.changed.batch_rows(part)
        return rows if tokens is None else max(1, min(rows, tokens // part.shape[1]))

    def _whiten(self, weights: list[nn.Parameter], inputs: list[Tensor]) -> Tensor | None:
        """Whiten inputs, and change the weights that read them accordingly, both in place.

        In the new coordinates the inputs have equal variance in every direction. Returns the matrix [n, n] that takes
        weights back, or None if there are none.
        """
        if not weights:
            return None
        gram = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64, device=self.changed.device)
        for index, rows in self.changed.every_batch(inputs):
            flat = inputs[index][rows].to(gram.device).flatten(0, 1)
            gram += flat.T @ flat
        tokens = sum(self.changed.count(part) * part.shape[1] for part in inputs)
        root, unroot = sqrt_pair(self.changed.ranks.sum(gram) / tokens, _DAMPING)
        for weight in weights:
            weight.data = (weight.data.double() @ root).float()
        for index, rows in self.changed.every_batch(inputs):
            part = inputs[index]
            part[rows].copy_(part[rows].to(gram.device) @ unroot.float())
        return unroot

    def _attention(self, layer: int, prefix: TextState, index: int) -> Callable[[Tensor, Rows], Tensor]:
        """The attention module as a function of its input and the input's sequences, called as the layer calls it."""
        attention, _, output = self.changed.modules(layer)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first = slice(0, self.changed.batch_rows(prefix.hidden[index]))
        with until(attention, lambda args, kwargs: calls.append((args, kwargs))):
            self.changed.call(layer, prefix, index, first)
        ((args, kwargs),) = calls

        def forward(x: Tensor, rows: Rows) -> Tensor:
            carried = prefix.carried_at(index, rows, self.changed.device)
            now = {**kwargs, **{name: value for name, value in carried.items() if name in kwargs}}
            kept: list[Tensor] = []

            def keep(module: nn.Module, args: Any, result: Tensor) -> None:
                kept.append(result)

            call = Call(args, now).rows(len(x))  # masks were made for as many sequences as a pass takes
            with hooked(output.register_forward_hook(keep)):
                if "hidden_states" in kwargs:
                    attention(*call.args, **{**call.kwargs, "hidden_states": x})
                else:
                    attention(x, *call.args[1:], **call.kwargs)
            return kept[0].reshape(*x.shape[:-1], -1)

        return forward


def _of_main(changed: Changed, ranks: Ranks) -> Changed:
    """The main process's closed form: a basis is free in its signs, which another GPU may choose otherwise."""
    if ranks.world == 1:
        return changed
    weights, order = changed.weights, changed.order
    parts = dict(vars(weights)) if isinstance(weights, Heads) else dict(weights)
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    if order is not None:
        order = (ranks.same({"order": order}) or {})["order"].to(order.device)
    told: dict[str, Any] = {name: t.to(tensors[name].device) for name, t in (ranks.same(tensors) or {}).items()}
    return replace(changed, weights=replace(weights, **told) if isinstance(weights, Heads) else told, order=order)


def _brought(
    inputs: list[Tensor], target: OutputTarget, share: float, device: torch.device
) -> tuple[list[Tensor], OutputTarget]:
    """(inputs, target) of a fit that reads sequences in any order, on the GPU where half of what is free holds them.

    What waits in the host's memory is brought as it is or in bfloat16, whose rounding is far below what a fit leaves;
    where neither fits, every step fetches its sequences.
    """
    if device.type != "cuda" or all(part.is_cuda for part in inputs):
        return inputs, target
    room = free_memory(device) // 2
    numbers = sum(part.numel() for part in [*inputs, *target.clean])
    dtype = next((dtype for dtype in (torch.float32, torch.bfloat16) if numbers * dtype.itemsize <= room), None)
    if dtype is None:
        return inputs, target
    return [part.to(device, dtype) for part in inputs], OutputTarget(target.with_drift(share, device, dtype), None)


def _at_once(rows: int, part: Tensor, half: bool, device: torch.device) -> int:
    """Sequences of a step of ``rows`` that go forward and back together, for which a GPU has room."""
    if device.type != "cuda":
        return rows
    sequence = part.shape[1] * part.shape[2] * _STATES * (2 if half else 4)
    return max(1, min(rows, free_memory(device) // 2 // sequence))


def _with_logits(heads: Heads, model: LogitModel, targets: list[Any], moments: Moments) -> tuple[Heads, list[float]]:
    """(heads with queries and keys refitted if that helps, logit error before and after)."""
    before = logit_error(model, targets, heads)
    refitted = refit_logits(heads, model, targets, moments)
    after = logit_error(model, targets, refitted)
    if not after < before:
        refitted, after = heads, before
    return refitted, [round(before, 5), round(after, 5)]
