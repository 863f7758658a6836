"""The calibrated conversion: a plan put as a job for healing, which knows no plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rehead.checkpoints.source import torch_dtype
from rehead.console import Progress
from rehead.convert.over_text import ffn_writer
from rehead.convert.own_text import with_own_text
from rehead.convert.planning import Plan
from rehead.data.calibration import CalibrationText, load_calibration
from rehead.data.repeats import repeating
from rehead.healing.finished import FinishedLayers
from rehead.healing.job import Job, LayerJob
from rehead.healing.moments import Moments
from rehead.healing.run import recover, solve
from rehead.models.by_heads import tensors_of
from rehead.models.families.spec import Family
from rehead.models.heads import Heads
from rehead.models.ranks import Ranks
from rehead.models.rewrite import Changed, LayerForm
from rehead.models.rewritten_source import cast


def calibrate(plan: Plan, finished: FinishedLayers, ranks: Ranks, progress: Progress | None) -> dict[str, Any]:
    """Compute a plan's layers over its text, and the model's own where that is wanted; as
    :func:`rehead.healing.run.recover`."""
    text = _whole_text(plan, ranks.device, progress) if ranks.main else CalibrationText([], [])
    names = ranks.from_main(lambda: text.names)
    parts = ranks.same({str(index): part for index, part in enumerate(text.tokens)}) or {}
    text = CalibrationText([part.cpu() for part in parts.values()], names)
    return recover(job_of(plan), text, finished, ranks.device, progress, ranks)


def calibrate_many(
    plans: Sequence[Plan], finished: Sequence[FinishedLayers], device: torch.device, progress: Progress | None
) -> dict[str, Any]:
    """The same for several plans for one model that want closed forms alone, in one pass over its text; as
    :func:`rehead.healing.run.solve`."""
    return solve([job_of(plan) for plan in plans], _whole_text(plans[0], device, progress), finished, device, progress)


def calibration_text(plan: Plan) -> CalibrationText:
    """The text that a plan's options name, as the model's tokens.

    Raises:
        UsageError: it cannot be used.
    """
    options, config = plan.options, plan.model.config
    lengths = options.lengths_within(getattr(config, "max_position_embeddings", None))
    return load_calibration(
        options.calibration,
        plan.model.source,
        int(config.vocab_size),
        options.calibration_tokens,
        lengths,
        options.seed,
    )


def _whole_text(plan: Plan, device: torch.device, progress: Progress | None) -> CalibrationText:
    """The text that a plan's options name, and what the model writes itself where they ask for that."""
    text, options = calibration_text(plan), plan.options
    if any(rewrite.form is not None and rewrite.form.hides for rewrite in plan.layer_rewrites):
        text = repeating(text, options.seed)
    if not options.own_text:
        return text
    return with_own_text(text, plan.source, options.own_text, device, options.seed, progress)


def job_of(plan: Plan) -> Job:
    """What a plan asks of healing."""
    model, infos = plan.model, plan.pooled.source.tensors
    modules = any(rewrite.form is not None and rewrite.form.module is not None for rewrite in plan.layer_rewrites)
    return Job(
        original=plan.original,
        changed=plan.pooled if modules else model,
        config=plan.pooled.config,
        layers={layer: _layer_job(plan, layer) for layer in model.layers if layer in plan.computed_layers},
        tensors=lambda layer, heads: tensors_of(model.family, layer, heads, model.source.tensors),
        store=lambda name, tensor: cast(name, tensor, torch_dtype(infos[name].dtype)),
        start=model,
        seed=plan.options.seed,
        own_calls=any(rewrite.form is not None and rewrite.form.own_calls for rewrite in plan.layer_rewrites),
    )


def _layer_job(plan: Plan, layer: int) -> LayerJob:
    model, options = plan.model, plan.options
    forms = [rewrite.form for rewrite in plan.layer_rewrites if rewrite.form is not None and layer in rewrite.layers]
    names = model.family.names
    writers: tuple[str, ...] = ()
    if options.refit and layer in plan.reblocked:
        ffn = ffn_writer(plan.model, layer)
        assert ffn is not None, "the plan has refused a layer without one"
        writers = (model.family.attention + names.output, ffn) if layer in plan.parallel_layers else (ffn,)
    style = forms[-1] if forms else LayerForm(lambda layer, heads, moments: Changed(heads))
    if style.module is not None and options.refit:
        writers = style.writers
    # Where layers differ in their forms, those that only hide tokens have little to fit.
    fits = len(forms) in (0, len(plan.layer_rewrites)) or any(form.calibrated for form in forms)
    return LayerJob(
        closed_form=_closed_form(forms, layer) if forms else None,
        needs=forms[0].needs if forms else (),
        groups=forms[0].groups if forms else 1,
        refit=options.refit and (bool(forms) or layer not in plan.parallel_layers),
        writers=writers,
        fit=options.fit if fits else 0,
        trains=(lambda attention: attention.parameters())
        if style.module is not None
        else lambda attention: _projections(model.family, attention, style.trains),
        settings=style.settings,
        module=style.module,
    )


def _closed_form(forms: Sequence[LayerForm], layer: int) -> Callable[[Heads, Moments | None], Changed]:
    """One closed form after another; the first reads the moments, which are of the original's heads."""

    def closed(heads: Heads, moments: Moments | None) -> Changed:
        changed = forms[0].closed(layer, heads, moments)
        for form in forms[1:]:
            assert isinstance(changed.weights, Heads), "the plan has refused a form that gives no heads to the next"
            after = form.closed(layer, changed.weights, None)
            changed = replace(after, facts=changed.facts | after.facts, order=changed.order)
        return changed

    return closed


def _projections(family: Family, attention: nn.Module, also: Sequence[str] = ()) -> Iterator[nn.Parameter]:
    """The weights of an attention module's four projections, and its parameters of these names."""
    names = family.names
    stems = (names.query, names.key, names.value, names.output)  # not all are there where they share a tensor
    every = attention.named_parameters()
    return (weight for name, weight in every if name in also or name.rpartition(".")[0] in stems)
