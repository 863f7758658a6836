"""The calibrated conversion: a plan put as a job for healing, which knows no plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rehead.checkpoints.source import torch_dtype
from rehead.console import Progress
from rehead.convert.planning import Plan
from rehead.data.calibration import CalibrationText, load_calibration
from rehead.healing.job import Changed, Job, LayerJob, query_order
from rehead.healing.moments import Moments
from rehead.healing.run import heal
from rehead.models.families.layouts import merge
from rehead.models.families.spec import Family
from rehead.models.heads import Heads
from rehead.models.rewritten import cast
from rehead.variants.pool.methods.registry import MethodContext, get_method
from rehead.variants.pool.regroup import POOL_MOMENTS, regroup


def calibrate(
    plan: Plan, work_dir: Path, device: torch.device, report: dict[int, dict[str, Any]], progress: Progress | None
) -> tuple[Callable[[int], dict[str, Tensor]], dict[str, Any]]:
    """Compute a plan's layers over its calibration text; as :func:`rehead.healing.run.heal`."""
    return heal(job_of(plan), calibration_text(plan), work_dir, device, report, progress)


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


def job_of(plan: Plan) -> Job:
    """What a plan asks of healing."""
    model, options = plan.model, plan.options
    infos = plan.pooled.source.tensors
    pools = plan.kv != model.num_kv_heads
    return Job(
        original=plan.original,
        changed=model,
        config=plan.layer_config,
        layers={layer: _layer_job(plan, layer) for layer in model.layers if pools or layer in plan.reblocked},
        tensors=lambda layer, heads: merge(model.family, layer, heads, model.source.tensors),
        store=lambda name, tensor: cast(name, tensor, torch_dtype(infos[name].dtype)),
        seed=options.seed,
    )


def _layer_job(plan: Plan, layer: int) -> LayerJob:
    model, options = plan.model, plan.options
    pools, reblocked = plan.kv != model.num_kv_heads, layer in plan.reblocked
    names = model.family.names
    writers: tuple[str, ...] = ()
    if options.refit and reblocked:
        ffn = plan.ffn_writer(layer)
        assert ffn is not None, "the plan has refused a layer without one"
        writers = (model.family.attention + names.output, ffn) if layer in plan.parallel_layers else (ffn,)
    needs = POOL_MOMENTS if get_method(options.method).needs_calibration or options.grouping != "contiguous" else ()
    return LayerJob(
        closed_form=_pool(plan, layer) if pools else None,
        needs=needs,
        groups=plan.kv if options.grouping == "contiguous" else model.num_kv_heads,
        refit=options.refit and (pools or layer not in plan.parallel_layers),
        writers=writers,
        fit=options.fit,
        trains=lambda attention: _projections(model.family, attention),
    )


def _pool(plan: Plan, layer: int) -> Callable[[Heads, Moments | None], Changed]:
    options, spread = plan.options, getattr(plan.model.config, "initializer_range", None) or 0.02

    def closed_form(heads: Heads, moments: Moments | None) -> Changed:
        context = MethodContext(layer, options.seed, moments, spread)
        result = regroup(heads, plan.kv, options.method, options.grouping, context)
        moved = options.grouping != "contiguous"
        order = query_order(result.groups, heads.group_size) if moved else None
        return Changed(result.heads, result.as_json(), order)

    return closed_form


def _projections(family: Family, attention: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of an attention module's four projections."""
    names = family.names
    stems = (names.query, names.key, names.value, names.output)  # not all are there where they share a tensor
    return (weight for name, weight in attention.named_parameters() if name.rpartition(".")[0] in stems)
