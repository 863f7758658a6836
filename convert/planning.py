"""The plan: exactly what a conversion changes, worked out and checked before any weight is read.

A plan is a chain of Rewrites (another class, fewer KV heads, ...). Each takes the model that the one before it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.shards import OutputTensor
from rehead.checkpoints.source import Source
from rehead.convert.hosts import host
from rehead.convert.options import DTYPES, ConvertOptions
from rehead.convert.over_text import check_calibrated, check_once, computed_over_text, with_refit
from rehead.convert.variants import check_lengths, host_for, variant_rewrite
from rehead.errors import UnsupportedError
from rehead.models.config import json_floats, with_older_rope
from rehead.models.layout import LayerLayout, bytes_per_token, sizes, windows
from rehead.models.meta import LoadReport, check_loads, draft_layers, drop_drafts, shapes_of, without_drafts
from rehead.models.model import Model
from rehead.models.remote import in_view_rounds, layout_facts
from rehead.models.rewrite import NeedsHost, Read, Rewrite, Step, layer_in, unchanged
from rehead.models.rewritten import rewritten
from rehead.models.rewritten_source import RewrittenSource
from rehead.models.serving import ENGINE_NAMES, SAME, deciding_runs, engines, facts_of
from rehead.variants.layer_choice import parse_layers
from rehead.variants.pool.rewrite import check_count, pool

if TYPE_CHECKING:
    from torch import Tensor

LayerProvider = Callable[[int], "dict[str, Tensor]"]
"""Gives the new tensors of a layer that was computed over calibration text; may be asked for a layer twice."""

#: Steps whose facts stand in a plan under their own names.
_TOLD = ("host", "block", "reinvest", "latent")


@dataclass(frozen=True)
class ChangedTensor:
    """One tensor that the conversion computes; ``layer`` is None for one outside the layers."""

    name: str
    layer: int | None
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]


@dataclass
class Plan:
    """What a conversion will do.

    Attributes:
        source: the checkpoint as it was opened.
        model: the model whose layers are computed: the source, or the same in other blocks or another class.
        pooled: the model with its layers computed, before it is widened.
        result: the model at the end of the chain.
        options: what was asked, with the number of KV heads filled in.
        strays: tensors that the class misses or ignores in the result as in the source (a base model has no head).
        dropped: tensors of draft layers that were left out as asked.
    """

    source: Model
    model: Model
    pooled: Model
    result: Model
    options: ConvertOptions
    strays: LoadReport | None = None
    dropped: list[str] = field(default_factory=list)

    # ---- the result

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """The whole chain."""
        return self.result.rewrites

    @property
    def raw_config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        raw = without_drafts(self.result.source.config) if self.dropped else self.result.source.config
        return with_older_rope(raw, self.source.source.id)

    @property
    def config(self) -> Any:
        """The same, resolved."""
        return self.result.config

    @property
    def outputs(self) -> list[OutputTensor]:
        """Every tensor of the result; those whose bytes are the source's say so."""
        source = self.result.source
        computed = source.computed if isinstance(source, RewrittenSource) else set()
        return [
            OutputTensor(name, info.dtype, info.shape, None if name in computed else name)
            for name, info in source.stored.items()
        ]

    @property
    def layouts(self) -> list[LayerLayout]:
        """What each layer of the result caches."""
        return self.result.layouts

    @property
    def exact(self) -> bool:
        """Whether the result computes what the source does."""
        return all(rewrite.exact for rewrite in self.rewrites)

    @property
    def rounded(self) -> bool:
        """Whether weights that stand for the same function were computed and stored in less than 32 bits."""
        rounds = any(rewrite.rounds for rewrite in self.rewrites) or in_view_rounds(self.source.source)
        return rounds and any(info.dtype in ("BF16", "F16") for info in self.result.source.stored.values())

    @property
    def changes(self) -> list[ChangedTensor]:
        """Every tensor of ``model`` whose numbers or shape change, with the shape that it ends in."""
        new: dict[str, tuple[int | None, tuple[int, ...]]] = {}
        source, chain = self.result.source, []
        while source is not self.model.source and isinstance(source, RewrittenSource):
            chain.append(source)
            source = source.inner
        for step in reversed(chain):
            old, new = new, {}
            for name, derived in step.rewrite.tensors.items():
                first = derived.sources[0]
                if first in old:
                    new[name] = old[first]
                elif derived.changed:
                    new[name] = (
                        layer_in(name) if derived.layer is None else derived.layer,
                        step.inner.tensors[first].shape,
                    )
        after = self.result.source.tensors
        return [ChangedTensor(name, layer, shape, after[name].shape) for name, (layer, shape) in new.items()]

    def chain(
        self, provide: LayerProvider | None = None, note: Callable[[int, dict[str, Any]], None] | None = None
    ) -> Source:
        """The source of the result's tensors.

        Args:
            provide: gives the layers of a calibrated conversion.
            note: called with (layer, facts) once a layer was computed.
        """
        source = self.source.source
        for rewrite in self.rewrites:
            if rewrite.calibrated and provide is not None:
                rewrite = replace(rewrite, step=_provided(provide))
            source = RewrittenSource(source, rewrite, note)
        return source

    # ---- what calibration is told

    @property
    def kv(self) -> int:
        """KV heads after the conversion."""
        return self.result.num_kv_heads

    @property
    def reblocked(self) -> tuple[int, ...]:
        """Layers whose block has another form than in the source."""
        return tuple(
            sorted({layer for rewrite in self.model.rewrites if not rewrite.exact for layer in rewrite.layers})
        )

    @property
    def original(self) -> Model:
        """The model that layers are calibrated against: before its blocks changed, if they do."""
        return self.source if self.reblocked else self.model

    @property
    def layer_rewrites(self) -> tuple[Rewrite, ...]:
        """What is done to layers between ``model`` and ``pooled``."""
        return self.pooled.rewrites[len(self.model.rewrites) :]

    @property
    def computed_layers(self) -> set[int]:
        """Layers that are computed over calibration text, where any is."""
        changed = {layer for rewrite in self.layer_rewrites for layer in rewrite.layers}
        return changed | set(self.reblocked)

    @property
    def calibrated(self) -> bool:
        """Whether the model has to be run over text."""
        return any(rewrite.calibrated for rewrite in self.rewrites)

    @property
    def parallel_layers(self) -> set[int]:
        """The layers whose block is parallel in the result, of those that changed."""
        return set(self.reblocked) if self.options.block == "parallel" else set()

    # ---- telling

    def _unexpected(self) -> list[str]:
        """Tensors that the class ignores; a host that stands in for it is not given them."""
        left_out = self.source.source.ignored.keys() - self.result.source.stored.keys()
        return sorted({*(self.strays.unexpected if self.strays else ()), *left_out})

    def as_json(self) -> dict[str, Any]:
        """The plan as plain JSON, as ``rehead plan --json`` prints it."""
        source, raw = self.source.source, self.raw_config
        steps = [rewrite for rewrite in self.rewrites if "options" not in rewrite.facts]
        facts = {rewrite.name: rewrite.facts for rewrite in steps if rewrite.name in _TOLD}
        if layout := layout_facts(source):
            facts = {"layout": layout, **facts}
        variants: dict[str, Any] = {}
        for rewrite in (rewrite for rewrite in self.rewrites if "options" in rewrite.facts):
            again = rewrite.name in variants
            variants[f"{rewrite.name} ({len(variants) + 1})" if again else rewrite.name] = rewrite.facts
        outputs, before, after = self.outputs, self.source.layouts, self.layouts
        return {
            "source": source.id,
            "revision": source.revision,
            "model_type": self.source.config.model_type,
            "layers": len(self.model.layers),
            "num_attention_heads": self.model.num_heads,
            "head_dim": self.model.head_dim,
            "num_key_value_heads": {"before": self.source.num_kv_heads, "after": self.kv},
            "kv_bytes_per_token": {"before": bytes_per_token(before), "after": bytes_per_token(after)},
            "windows": windows(after),
            "cache_bytes": {"before": sizes(before), "after": sizes(after)},
            "parameters": {"before": self.source.parameters(), "after": self.result.parameters()},
            **facts,
            **({"variants": variants} if variants else {}),
            "missing": sorted(self.strays.missing) if self.strays else [],
            "unexpected": self._unexpected(),
            "drafts": draft_layers(source),
            "dropped": self.dropped,
            "code_left_out": source.code_left_out(),
            "engines": engines(raw),
            "exact": self.exact,
            "rounded": self.rounded,
            "options": self.options.as_json(
                self.calibrated, getattr(self.model.config, "max_position_embeddings", None)
            ),
            "config_changes": {
                key: {"before": json_floats(source.config.get(key)), "after": json_floats(value)}
                for key, value in (dict.fromkeys(source.config) | raw).items()
                if source.config.get(key) != value
            },
            "changes": [
                {"name": c.name, "layer": c.layer, "before": list(c.old_shape), "after": list(c.new_shape)}
                for c in self.changes
            ],
            "unchanged_tensors": sum(1 for tensor in outputs if tensor.origin is not None),
        }


def make_plan(model: Model, options: ConvertOptions) -> Plan:
    """Work out the conversion and check it against the target class on the meta device.

    Raises:
        UsageError: the number of KV heads does not divide the model's, or exceeds it.
        UnsupportedError: the class cannot express the result, or would not load it.
    """
    source, old, dropped = model, model.num_kv_heads, drop_drafts(model.source) if options.drop_drafts else []
    check_lengths(model, options)
    if options.is_latent:
        from rehead.convert.latent import with_latent

        both = with_latent(model, options, DTYPES[options.dtype])
        return _checked(Plan(source, model, *both, options, dropped=dropped))
    kv = options.num_key_value_heads or old
    options = options.but(num_key_value_heads=kv)
    check_count(model, kv)
    if options.block is not None:
        from rehead.variants.blocks.forms import reblock

        model = rewritten(model, reblock(model, options.block, options.layers, options.plain))
    told = None if options.host == "auto" and layout_facts(source.source) else options.host  # which opening it did
    model, pooled = _hosted(model, options, kv, told)
    result = pooled
    if options.reinvest is not None:
        from rehead.convert.reinvest import widen

        result = rewritten(pooled, widen(pooled, old, options.reinvest, options.multiple_of, options.seed))
    return _checked(Plan(source, model, pooled, result, options, dropped=dropped))


def _checked(plan: Plan) -> Plan:
    """A plan whose result its class loads and the engine that was asked for computes; raises UnsupportedError."""
    source, model, result = plan.source, plan.model, plan.result
    # A stray tensor is no fault of the plan's where the model it was renamed from has it too.
    named_alike = model if any(rewrite.renames for rewrite in model.rewrites) else source
    plan.strays = check_loads(
        named_alike.config, shapes_of(named_alike.source.stored), result.config, shapes_of(result.source.stored)
    )
    _check_served(plan)
    return plan


def _check_served(plan: Plan) -> None:
    """Refuse a result that the engine it is written for was seen to compute wrongly; one never run on it may do."""
    engine = plan.options.engine
    run = deciding_runs(plan.raw_config).get(ENGINE_NAMES.get(engine or "", ""))
    if run is None or run.outcome == SAME:
        return
    kind, rope = plan.raw_config["model_type"], facts_of(plan.raw_config)["rope_type"]
    if rope == "default":
        raise UnsupportedError(f"--for {engine}: does not compute {kind} of this kind; leave --for out")
    ways = ("--host youtu" if engine == "vllm" else "fewer --rope-dims") if plan.options.is_latent else "--rope yarn"
    raise UnsupportedError(
        f"--for {engine}: does not compute {kind} with a RoPE of type {rope}; give {ways}, or leave --for out"
    )


def _hosted(model: Model, options: ConvertOptions, kv: int, told: str | None) -> tuple[Model, Model]:
    """A model in a class that holds the result, ``told`` if that is given, and the same with its layers computed."""
    wanted = told or host_for(model, options) or ("auto" if kv != model.num_kv_heads and model.family.hosted else None)
    own = rewritten(model, host(model, wanted, options.sink_logit)) if wanted else model
    try:
        return own, _with_layers(own, options, kv)
    except NeedsHost as needs:
        if told is not None:
            raise
        try:
            other = rewritten(model, host(model, needs.host, options.sink_logit))
        except UnsupportedError:
            raise needs from None
    return other, _with_layers(other, options, kv)


def _with_layers(model: Model, options: ConvertOptions, kv: int) -> Model:
    """A model with its layers computed: pooled, then given each variant, in the dtype that is written."""
    source, rewrites, current = model.source, [], model
    if kv != model.num_kv_heads:
        rewrites.append(pool(model, kv, options.method, options.grouping, options.seed))
        current = rewritten(model, rewrites[0])
    for variant, asked in options.asked_variants:
        named = set(parse_layers(asked.layers, int(model.config.num_hidden_layers))) if rewrites else set()
        check_once(model, rewrites, variant.name, named, bool(variant.needs(asked)))
        rewrites.append(variant_rewrite(current, variant, asked))
        current = rewritten(current, rewrites[-1])
    reblocked = {layer for before in model.rewrites for layer in before.layers}
    recovers = options.refit or options.fit > 0
    changed = {layer for rewrite in rewrites for layer in rewrite.layers}
    rewrites = rewrites or [unchanged("copy", source.config, model.family, source.tensors)]
    if any(rewrite.calibrated for rewrite in rewrites) or (recovers and (changed or reblocked)):
        check_calibrated(model, rewrites)
        rewrites = [computed_over_text(model, rewrite, recovers, options.refit) for rewrite in rewrites]
        if options.refit:
            rewrites[-1] = with_refit(model, rewrites[-1], reblocked)
    code = DTYPES[options.dtype]
    if code is not None:
        rewrites[0] = rewrites[0].stored_as(code, source.tensors)
        rewrites = [replace(rewrite, config=_in_dtype(rewrite.config, options.dtype)) for rewrite in rewrites]
    for rewrite in rewrites:
        model = rewritten(model, rewrite)
    return model


def _in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}


def _provided(provide: LayerProvider) -> Step:
    def step(layer: int, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return provide(layer), {}

    return step
