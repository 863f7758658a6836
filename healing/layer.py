"""Converting one layer on calibration text: pool by what it sees, refit, fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.checkpoints.source import torch_dtype
from rehead.convert.execute import layer_tensors
from rehead.healing.blocks import refit_writers
from rehead.healing.fit import DRIFT, fit_attention
from rehead.healing.layerwise import batch_rows
from rehead.healing.moments import LayerStatistics
from rehead.healing.refit import (
    LogitModel,
    LogitTargets,
    OutputRefit,
    OutputTarget,
    Rotation,
    logit_error,
    refit_logits,
)
from rehead.healing.sight import QUERY_ROWS, LayerSight, Stop, hooked, ordered, queries_of, spread, with_one
from rehead.models.families.layouts import split
from rehead.models.heads import Heads
from rehead.variants.pool.grouping import permute, similar_groups
from rehead.variants.pool.methods.registry import MethodContext, get_method
from rehead.variants.pool.regroup import LayerResult, regroup

#: Memory for the logits that the refit matches, and the most queries whose logits it matches.
_LOGIT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_LOGIT_QUERIES = {"cpu": 48 * QUERY_ROWS, "cuda": 192 * QUERY_ROWS}


class LayerHealer(LayerSight):
    """Converts layers one after another; holds what they share."""

    # ---- one layer

    def convert(
        self, layer: int, hidden: list[Tensor], ours: list[Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """Convert the layer that is loaded in ``original``.

        Args:
            hidden: the original's hidden states before the layer; overwritten with those after it.
            ours: the converted prefix's.

        Returns:
            (new tensors in the planned dtypes, facts for the manifest, the original's hidden states after the layer).
        """
        options, kv = self.options, self.plan.kv
        pools, reblocked = kv != self.model.num_kv_heads, layer in self.model.reblocked
        if not pools and not reblocked:
            return {}, {}, self.run(self.original, layer, hidden)
        heads = self.model.heads(layer).to(self.device, torch.float32)
        facts: dict[str, Any] = {}
        pooled, inputs = heads, None
        if pools:
            pooled, inputs, facts = self._pool(layer, heads, hidden, ours)
            inputs = inputs if options.fit else None  # as large as the hidden states: not kept for nothing
        target = self._run_original(layer, hidden, ours) if (options.refit or options.fit) else None
        if target is None:
            self.run(self.original, layer, hidden)
        else:
            if options.refit and (pools or layer not in self.plan.parallel_layers):
                pooled = self._refit_output(layer, pooled, ours, target)
            if options.fit and inputs is not None:
                pooled, facts["fit_loss"] = self._fit(layer, pooled, inputs, ours, target)
                if options.refit:
                    pooled = self._refit_output(layer, pooled, ours, target)
        extra: dict[str, Tensor] = {}
        if options.refit and reblocked:
            pooled, extra, errors = refit_writers(self, layer, pooled, ours, hidden)
            facts["block_error"] = [round(error, 6) for error in errors]
        tensors = layer_tensors(self.plan, layer, LayerResult(pooled, [], 0.0, 0.0))
        dtypes = {tensor.name: torch_dtype(tensor.dtype) for tensor in self.plan.outputs}
        return tensors | {name: tensor.to(dtypes[name]) for name, tensor in extra.items()}, facts, hidden

    def _pool(
        self, layer: int, heads: Heads, hidden: list[Tensor], ours: list[Tensor]
    ) -> tuple[Heads, list[Tensor] | None, dict[str, Any]]:
        """(pooled heads, attention's inputs on the converted prefix, facts); logits are refitted if asked for."""
        options, kv = self.options, self.plan.kv
        rotation, scaling = self.geometry(layer, heads, hidden)
        inputs, order = self.inputs_of(layer, ours), None
        groups = None
        if options.grouping == "similar":
            whole = self.statistics(layer, ours, inputs, 1, rotation, None)
            groups = similar_groups(heads, kv, options.method, whole)
            heads = permute(heads, groups)
            span = torch.arange(heads.group_size)
            order = torch.cat([head * heads.group_size + span for group in groups for head in torch.tensor(group)])
        need = get_method(options.method).needs_calibration or options.refit
        statistics = self.statistics(layer, ours, inputs, kv, rotation, order) if need else None
        spread = getattr(self.model.config, "initializer_range", None) or 0.02
        context = MethodContext(layer, options.seed, statistics, spread)
        result = regroup(heads, kv, options.method, "contiguous", context)
        facts: dict[str, Any] = {**result.as_json(), "groups": groups or result.groups}
        pooled = result.heads
        if options.refit and statistics is not None:
            geometry = (rotation, scaling)
            pooled, note = self._refit_logits(layer, pooled, hidden, inputs, geometry, statistics, order)
            facts.update(note)
        return pooled, inputs, facts

    # ---- healing

    def _refit_logits(
        self,
        layer: int,
        pooled: Heads,
        hidden: list[Tensor],
        inputs: list[Tensor],
        geometry: tuple[Rotation | None, float | None],
        statistics: LayerStatistics,
        order: Tensor | None,
    ) -> tuple[Heads, dict[str, Any]]:
        rotation, scaling = geometry
        if rotation is None or scaling is None:
            return pooled, {"logits": "not refitted: not linear in the projections"}
        targets = []
        for part, mine in zip(hidden, inputs):
            length = part.shape[1]
            count, queries = self._logit_share(part, pooled.num_heads, len(hidden))
            chosen = torch.linspace(0, len(part) - 1, count).long()
            for number, rows in enumerate(chosen.split(min(8, batch_rows(part, self.batch_tokens)))):
                at = spread(length, queries, number, self.device)
                seen = self.seen(layer, part[rows], at)
                assert seen is not None
                p, scores = ordered(seen.probabilities, order), ordered(seen.scores, order)
                targets.append(LogitTargets(with_one(mine[rows].to(self.device)), at, p, scores))
        model = LogitModel(rotation, scaling)
        before = logit_error(model, targets, pooled)
        refitted = refit_logits(pooled, model, targets, statistics)
        after = logit_error(model, targets, refitted)
        if not after < before:
            return pooled, {"logit_error": [round(before, 5), round(before, 5)]}
        return refitted, {"logit_error": [round(before, 5), round(after, 5)]}

    def _logit_share(self, part: Tensor, heads: int, lengths: int) -> tuple[int, int]:
        """(sequences of one length that logits are matched on, queries of each).

        Every length gets as many queries for its tokens: what lies far back is seen in long ones alone.
        """
        kind, (have, length) = self.device.type, part.shape[:2]
        queries = _LOGIT_QUERIES.get(kind, 48 * QUERY_ROWS) // lengths
        queries = min(queries, _LOGIT_BYTES.get(kind, 1 << 30) // lengths // (8 * heads * length))
        count = max(1, min(queries // min(QUERY_ROWS, length), have))
        return count, max(1, min(queries // count, queries_of(length)))

    def _run_original(self, layer: int, hidden: list[Tensor], ours: list[Tensor]) -> OutputTarget:
        """Advance ``hidden`` through the original layer and say what the converted attention ought to give."""
        _, _, output = self.modules(self.original, layer)
        family, config = self.model.family, self.model.config
        drift = None
        if not family.post_norm_of(config):
            scale = family.residual_scale(config, layer)
            drift = [(theirs - mine) / scale for theirs, mine in zip(hidden, ours)]
        clean = []
        for part in hidden:
            outputs: list[Tensor] = []
            for rows in self.batches(part):
                kept: list[Tensor] = []
                with hooked(output.register_forward_hook(lambda module, args, result, kept=kept: kept.append(result))):
                    after = self.original.run_layer(layer, part[rows].to(self.device))
                outputs.append(kept[0].reshape(*after.shape[:2], -1).to(part.device))
                part[rows] = after.to(part.device)
            clean.append(torch.cat(outputs))
        return OutputTarget(clean, drift)

    def _refit_output(
        self,
        layer: int,
        pooled: Heads,
        ours: list[Tensor],
        goal: OutputTarget,
    ) -> Heads:
        self.load_converted(layer, pooled)
        _, _, output = self.modules(self.converted, layer)
        refit = OutputRefit(pooled)
        for index, rows in self.every_batch(ours):
            target = goal.at(index, rows, 1.0, self.device)

            def count(module: nn.Module, args: tuple[Tensor, ...], target: Tensor = target) -> None:
                refit.add(args[0].reshape(*target.shape[:-1], -1), target)
                raise Stop

            self.glimpse(self.converted, layer, ours[index][rows], output.register_forward_pre_hook(count))
        self.converted.unload_layer(layer)
        return refit.solve(pooled)

    def load_converted(self, layer: int, pooled: Heads) -> None:
        result = LayerResult(pooled, [], 0.0, 0.0)
        self.converted.load_layer(layer, layer_tensors(self.plan, layer, result, keep_float=True))

    def _fit(
        self, layer: int, pooled: Heads, inputs: list[Tensor], ours: list[Tensor], goal: OutputTarget
    ) -> tuple[Heads, float]:
        self.load_converted(layer, pooled)
        attention, _, output = self.modules(self.converted, layer)
        forwards = [self._attention_call(layer, attention, output, part) for part in ours]
        moved = {
            name: parameter
            for name, parameter in attention.named_parameters()
            if name.rpartition(".")[0] in _projections(self.model.family)
        }
        loss = fit_attention(
            moved,
            lambda index, rows: forwards[index](inputs[index][rows].to(self.device)),
            lambda index, rows: goal.at(index, rows, DRIFT, self.device),
            self.options.fit,
            [(len(part), batch_rows(part, self.batch_tokens)) for part in inputs],
            self.options.seed + layer,
        )
        prefix = self.model.family.prefix(layer)
        tensors = {prefix + name: value.detach().clone() for name, value in attention.state_dict().items()}
        kv = self.plan.kv
        fitted = split(self.model.family, self.plan.layer_config, layer, tensors, kv)
        self.converted.unload_layer(layer)
        moved_weights: dict[str, Any] = fitted.tensors()
        return replace(pooled, **moved_weights), round(loss, 6)

    def _attention_call(
        self, layer: int, attention: nn.Module, output: nn.Module, ours: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """The attention module as a function of its input, called as the layer calls it."""
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise Stop

        handle = attention.register_forward_pre_hook(catch, with_kwargs=True)
        self.glimpse(self.converted, layer, ours[: batch_rows(ours, self.batch_tokens)], handle)
        args, kwargs = caught[0]

        def forward(x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            with hooked(output.register_forward_hook(lambda module, args, result: kept.append(result))):
                if "hidden_states" in kwargs:
                    attention(*args, **{**kwargs, "hidden_states": x})
                else:
                    attention(x, *args[1:], **kwargs)
            return kept[0].reshape(*x.shape[:-1], -1)

        return forward


def _projections(family: Any) -> set[str]:
    names = family.names
    return {names.query, names.key, names.value, names.output}
