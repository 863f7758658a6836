"""Converting one layer on calibration text: gather statistics, pool, refit, fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.convert.calibration.blocks import refit_writers
from rehead.convert.calibration.fit import DRIFT, fit_attention
from rehead.convert.calibration.layerwise import LayerwiseModel
from rehead.convert.calibration.probe import PROBE, Seen, observing
from rehead.convert.calibration.refit import (
    LogitModel,
    LogitTargets,
    OutputRefit,
    OutputTarget,
    Rotation,
    logit_error,
    refit_logits,
)
from rehead.convert.calibration.statistics import LayerStatistics, StatisticsGatherer
from rehead.convert.execute import layer_tensors
from rehead.convert.families.layouts import split
from rehead.convert.grouping import permute, similar_groups
from rehead.convert.heads import Heads
from rehead.convert.methods.registry import MethodContext, get_method
from rehead.convert.planning import Plan
from rehead.convert.regroup import LayerResult, regroup
from rehead.convert.source import torch_dtype

#: Memory for the logits that the refit matches, and the most sequences it uses.
_LOGIT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_LOGIT_SEQUENCES = {"cpu": 48, "cuda": 192}
#: Queries of each sequence whose attention is looked at; their keys are all there.
_QUERY_ROWS = 64
#: Tokens for the statistics of attention itself.
_ATTENTION_TOKENS = {"cpu": 16384, "cuda": 65536}


class _Stop(Exception):
    """What was wanted of a forward pass has been seen."""


class LayerHealer:
    """Converts layers one after another; holds what they share.

    Args:
        plan: the conversion.
        original, converted: the two models, of which the layer at hand is loaded in ``original``.
        batch: sequences in one forward pass.
    """

    def __init__(self, plan: Plan, original: LayerwiseModel, converted: LayerwiseModel, batch: int) -> None:
        self.plan, self.original, self.converted, self.batch = plan, original, converted, batch
        self.model, self.options = plan.model, plan.options
        self.device = original.device

    # ---- running

    def batches(self, count: int) -> Iterator[slice]:
        """Slices of whole batches."""
        return (slice(at, at + self.batch) for at in range(0, count, self.batch))

    def run(self, model: LayerwiseModel, layer: int, hidden: Tensor) -> Tensor:
        """A loaded layer over all of the text; ``hidden`` is overwritten with the result."""
        for rows in self.batches(len(hidden)):
            hidden[rows] = model.run_layer(layer, hidden[rows].to(self.device)).to(hidden.device)
        return hidden

    def _glimpse(
        self, model: LayerwiseModel, layer: int, hidden: Tensor, handle: Any, implementation: str | None = None
    ) -> None:
        """Run a loaded layer on some sequences until a hook has seen enough and stops it; the hook is removed."""
        with _hooked(handle), suppress(_Stop):
            model.run_layer(layer, hidden.to(self.device), implementation)

    def _modules(self, model: LayerwiseModel, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """(attention, the projection that reads its input, the output projection)."""
        family = self.model.family
        attention = model.layers[layer].get_submodule(family.attention.rstrip("."))
        return attention, attention.get_submodule(family.names.query), attention.get_submodule(family.names.output)

    # ---- one layer

    def convert(self, layer: int, hidden: Tensor, ours: Tensor) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Convert the layer that is loaded in ``original``.

        Args:
            hidden: the original's hidden states before the layer [N, S, n]; overwritten with those after it.
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

    def _pool(self, layer: int, heads: Heads, hidden: Tensor, ours: Tensor) -> tuple[Heads, Tensor, dict[str, Any]]:
        """(pooled heads, attention's inputs on the converted prefix, facts); logits are refitted if asked for."""
        options, kv = self.options, self.plan.kv
        rotation, scaling = self._geometry(layer, heads, hidden)
        inputs, order = self._inputs(layer, ours), None
        groups = None
        if options.grouping == "similar":
            whole = self._statistics(layer, ours, inputs, 1, rotation, None)
            groups = similar_groups(heads, kv, options.method, whole)
            heads = permute(heads, groups)
            span = torch.arange(heads.group_size)
            order = torch.cat([head * heads.group_size + span for group in groups for head in torch.tensor(group)])
        need = get_method(options.method).needs_calibration or options.refit
        statistics = self._statistics(layer, ours, inputs, kv, rotation, order) if need else None
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

    # ---- what the layer sees

    def _inputs(self, layer: int, ours: Tensor) -> Tensor:
        """The attention's inputs on the converted prefix, [N, S, n]."""
        _, reader, _ = self._modules(self.original, layer)
        found = torch.empty_like(ours)

        for rows in self.batches(len(ours)):

            def keep(module: nn.Module, args: tuple[Tensor, ...], rows: slice = rows) -> None:
                found[rows] = args[0].to(found.device)
                raise _Stop

            self._glimpse(self.original, layer, ours[rows], reader.register_forward_pre_hook(keep))
        return found

    def _statistics(
        self, layer: int, ours: Tensor, inputs: Tensor, kv: int, rotation: Rotation | None, order: Tensor | None
    ) -> LayerStatistics:
        width = inputs.shape[-1] + 1
        gatherer = StatisticsGatherer(width, kv, self.device)
        _, _, output = self._modules(self.original, layer)
        # What attention makes of the inputs costs far more to gather than the inputs themselves, and less will do.
        enough = max(_ATTENTION_TOKENS.get(self.device.type, 16384), 8 * width) // inputs.shape[1]
        every = max(1, len(inputs) // self.batch // max(enough // self.batch, 1))
        for number, rows in enumerate(self.batches(len(inputs))):
            x = _with_one(inputs[rows].to(self.device))
            gatherer.add_inputs(x)
            if number % every:
                continue

            rows_seen = _spread(x.shape[1], _QUERY_ROWS, number, self.device)

            def see(seen: Seen, x: Tensor = x, rows_seen: Tensor = rows_seen) -> None:
                gatherer.add_attention(x, _picked(seen.probabilities, rows_seen, order))

            with observing(see):
                self._glimpse(self.original, layer, ours[rows], output.register_forward_pre_hook(_stop), PROBE)
        angles = None
        if rotation is not None and len(rotation.pairs) and len(rotation.factors) > 1:
            angles = (rotation.factors[1] / rotation.factors[0]).angle().cpu()
        return gatherer.finish(angles, inputs.shape[1])

    def _geometry(self, layer: int, heads: Heads, hidden: Tensor) -> tuple[Rotation | None, float | None]:
        """How the layer rotates and scales, proved on numbers: None where its logits are not what we compute."""
        rotation = self._rotation(layer, heads, hidden.shape[1])
        if rotation is None or heads.key_norm != "none":
            return rotation, None
        rows = hidden[: self.batch][:1]
        seen = self._seen(layer, rows)
        if seen is None:
            return rotation, None
        x = _with_one(self._inputs_of(layer, rows))
        model = LogitModel(rotation, seen.scaling)
        q, k = model.weights(heads)
        ours, theirs = model.scores(model.states(x, q), model.states(x, k)), seen.scores
        mask = seen.visible.expand_as(theirs)
        gap = (ours - theirs)[mask].abs().max() / theirs[mask].abs().max().clamp_min(1e-6)
        return rotation, seen.scaling if float(gap) < 1e-3 else None

    def _rotation(self, layer: int, heads: Heads, length: int) -> Rotation | None:
        """The model's own rotary factors for this layer, from what the layer is called with."""
        pairs = heads.pairs
        if pairs is None or not len(pairs):
            return Rotation(torch.ones(length, 0, dtype=torch.complex64, device=self.device), torch.empty(0, 2).long())
        call = self.original.calls[self.original.default][layer]
        given = call.kwargs.get("position_embeddings")
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
            return None
        cos, sin = (part.float().reshape(-1, *part.shape[-2:])[0] for part in given)
        count = len(pairs)
        if cos.shape[-1] == 2 * count:
            twice = bool(torch.equal(cos[:, 0::2], cos[:, 1::2]))
            cos, sin = (part[:, 0::2] if twice else part[:, :count] for part in (cos, sin))
        if cos.shape[-1] != count or len(cos) < length:
            return None
        return Rotation(torch.complex(cos, sin)[:length].to(self.device), pairs.to(self.device))

    def _seen(self, layer: int, hidden: Tensor) -> Seen | None:
        """What the original's attention computes on a few sequences; None where it cannot be observed."""
        _, _, output = self._modules(self.original, layer)
        found: list[Seen] = []
        with observing(found.append):
            self._glimpse(self.original, layer, hidden, output.register_forward_pre_hook(_stop), PROBE)
        return found[0] if found else None

    def _inputs_of(self, layer: int, hidden: Tensor) -> Tensor:
        return self._inputs(layer, hidden).to(self.device)

    # ---- healing

    def _refit_logits(
        self,
        layer: int,
        pooled: Heads,
        hidden: Tensor,
        inputs: Tensor,
        geometry: tuple[Rotation | None, float | None],
        statistics: LayerStatistics,
        order: Tensor | None,
    ) -> tuple[Heads, dict[str, Any]]:
        rotation, scaling = geometry
        if rotation is None or scaling is None:
            return pooled, {"logits": "not refitted: not linear in the projections"}
        length, kind = hidden.shape[1], self.device.type
        cost = 8 * pooled.num_heads * length * min(_QUERY_ROWS, length)
        count = max(1, min(_LOGIT_BYTES.get(kind, 1 << 30) // cost, _LOGIT_SEQUENCES.get(kind, 24), len(hidden)))
        chosen = torch.linspace(0, len(hidden) - 1, count).long()
        step = max(1, min(8, count, self.batch))
        targets = []
        for number, rows in enumerate(chosen.split(step)):
            seen = self._seen(layer, hidden[rows])
            assert seen is not None
            at = _spread(length, _QUERY_ROWS, number, self.device)
            p, scores = _picked(seen.probabilities, at, order), _picked(seen.scores, at, order)
            targets.append(LogitTargets(_with_one(inputs[rows].to(self.device)), at, p, scores))
        model = LogitModel(rotation, scaling)
        before = logit_error(model, targets, pooled)
        refitted = refit_logits(pooled, model, targets, statistics)
        after = logit_error(model, targets, refitted)
        if not after < before:
            return pooled, {"logit_error": [round(before, 5), round(before, 5)]}
        return refitted, {"logit_error": [round(before, 5), round(after, 5)]}

    def _run_original(self, layer: int, hidden: Tensor, ours: Tensor) -> OutputTarget:
        """Advance ``hidden`` through the original layer and say what the converted attention ought to give."""
        _, _, output = self._modules(self.original, layer)
        family, config = self.model.family, self.model.config
        drift = None
        if not family.post_norm_of(config):
            drift = (hidden - ours) / family.residual_scale(config, layer)
        clean: Tensor | None = None
        for rows in self.batches(len(hidden)):
            kept: list[Tensor] = []
            with _hooked(output.register_forward_hook(lambda module, args, result, kept=kept: kept.append(result))):
                after = self.original.run_layer(layer, hidden[rows].to(self.device))
            if clean is None:
                clean = torch.empty(*hidden.shape[:-1], kept[0].shape[-1], device=hidden.device)
            clean[rows] = kept[0].reshape(clean[rows].shape).to(clean.device)
            hidden[rows] = after.to(hidden.device)
        assert clean is not None
        return OutputTarget(clean, drift)

    def _refit_output(
        self,
        layer: int,
        pooled: Heads,
        ours: Tensor,
        goal: OutputTarget,
    ) -> Heads:
        self.load_converted(layer, pooled)
        _, _, output = self._modules(self.converted, layer)
        refit = OutputRefit(pooled)
        for rows in self.batches(len(ours)):
            target = goal.at(rows, 1.0, self.device)

            def count(module: nn.Module, args: tuple[Tensor, ...], target: Tensor = target) -> None:
                refit.add(args[0].reshape(*target.shape[:-1], -1), target)
                raise _Stop

            self._glimpse(self.converted, layer, ours[rows], output.register_forward_pre_hook(count))
        self.converted.unload_layer(layer)
        return refit.solve(pooled)

    def load_converted(self, layer: int, pooled: Heads) -> None:
        result = LayerResult(pooled, [], 0.0, 0.0)
        self.converted.load_layer(layer, layer_tensors(self.plan, layer, result, keep_float=True))

    def _fit(self, layer: int, pooled: Heads, inputs: Tensor, ours: Tensor, goal: OutputTarget) -> tuple[Heads, float]:
        self.load_converted(layer, pooled)
        attention, reader, output = self._modules(self.converted, layer)
        forward = self._attention_call(layer, attention, reader, ours)
        moved = {
            name: parameter
            for name, parameter in attention.named_parameters()
            if name.rpartition(".")[0] in _projections(self.model.family)
        }
        loss = fit_attention(
            moved,
            lambda rows: forward(inputs[rows].to(self.device), output),
            inputs,
            lambda rows: goal.at(rows, DRIFT, self.device),
            self.options.fit,
            self.batch,
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
        self, layer: int, attention: nn.Module, reader: nn.Module, ours: Tensor
    ) -> Callable[[Tensor, nn.Module], Tensor]:
        """The attention module as a function of its input, called as the layer calls it."""
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _Stop

        handle = attention.register_forward_pre_hook(catch, with_kwargs=True)
        self._glimpse(self.converted, layer, ours[: self.batch], handle)
        args, kwargs = caught[0]

        def forward(x: Tensor, output: nn.Module) -> Tensor:
            kept: list[Tensor] = []
            with _hooked(output.register_forward_hook(lambda module, args, result: kept.append(result))):
                if "hidden_states" in kwargs:
                    attention(*args, **{**kwargs, "hidden_states": x})
                else:
                    attention(x, *args[1:], **kwargs)
            return kept[0].reshape(*x.shape[:-1], -1)

        return forward


def _projections(family: Any) -> set[str]:
    names = family.names
    return {names.query, names.key, names.value, names.output}


def _spread(length: int, count: int, number: int, device: torch.device) -> Tensor:
    """``count`` positions spread evenly over a sequence, shifted from batch to batch so that all come up."""
    count = min(count, length)
    stride = length // count
    return torch.arange(count, device=device) * stride + number % stride


def _picked(attention: Tensor, rows: Tensor, order: Tensor | None) -> Tensor:
    """Some queries' rows of [b, H, S, S], with the heads in a new order; memory of its own."""
    picked = attention[:, :, rows]
    return picked if order is None else picked[:, order.to(picked.device)]


def _with_one(x: Tensor) -> Tensor:
    """x~ = [x, 1]: the one carries biases."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _stop(module: nn.Module, args: Any) -> None:
    raise _Stop


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
