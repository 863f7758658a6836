"""The plan: exactly what a conversion changes, worked out and checked before any weight is read."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.shards import OutputTensor
from rehead.convert.options import DTYPES, ConvertOptions
from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import json_floats, resolve_config
from rehead.models.families.layouts import merge
from rehead.models.meta import LoadReport, check_loads, draft_layers, shapes_of
from rehead.models.model import Model, hosted
from rehead.variants.pool.methods.mean import mean
from rehead.variants.pool.methods.registry import MethodContext

if TYPE_CHECKING:
    from rehead.convert.reinvest import Widening

#: Where classes whose blocks can change keep the FFN's output matrix.
_FFN_WRITERS = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj", "mlp.fc2")
#: Methods that leave queries and the output projection alone.
KV_ONLY = ("mean", "first", "random")


@dataclass(frozen=True)
class Change:
    """One tensor that the conversion rewrites; ``layer`` is None for one outside the layers."""

    name: str
    layer: int | None
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]


@dataclass
class Plan:
    """What a conversion will do.

    Attributes:
        source: the checkpoint as it was opened.
        model: the same under the class that it is converted in: its own, or the one that stands in for it.
        options: what was asked, with the number of KV heads filled in.
        changes: tensors that layers compute anew, before the model is widened.
        outputs: every tensor of the result, copied or computed, in the source's order.
        raw_config: the result's ``config.json``.
        config: the same, resolved.
        layer_config: the config of the model before it is widened, in which layers are converted one by one.
        widening: what becomes of the tensors after that, or None.
        strays: tensors that the class misses or ignores in the result as in the source (a base model has no head).
    """

    source: Model
    model: Model
    options: ConvertOptions
    changes: list[Change]
    outputs: list[OutputTensor]
    raw_config: dict[str, Any]
    config: Any
    layer_config: Any
    widening: Widening | None = None
    strays: LoadReport | None = None

    @property
    def kv(self) -> int:
        """KV heads after the conversion."""
        assert self.options.num_key_value_heads is not None
        return self.options.num_key_value_heads

    @property
    def original(self) -> Model:
        """The model that layers are calibrated against: before its blocks changed, if they do."""
        return self.source if self.model.reblocked else self.model

    @property
    def calibrated(self) -> bool:
        """Whether the model has to be run over text."""
        options, pooled = self.options, self.kv != self.model.num_kv_heads
        return options.needs_calibration if pooled else bool(self.model.reblocked) and options.refit

    @property
    def exact(self) -> bool:
        """Whether the result computes what the source does."""
        return self.kv == self.model.num_kv_heads and not self.model.reblocked

    @property
    def parallel_layers(self) -> set[int]:
        """The layers whose block is parallel in the result, of those that changed."""
        return set(self.model.reblocked) if self.options.block == "parallel" else set()

    def ffn_writer(self, layer: int) -> str | None:
        """As :func:`ffn_writer`."""
        return ffn_writer(self.model, layer)

    @property
    def rounded(self) -> bool:
        """Whether weights that stand for the same function were computed and stored in less than 32 bits."""
        rounds = self.model.rounds or (self.widening is not None and self.widening.rounds)
        return rounds and any(tensor.dtype in ("BF16", "F16") for tensor in self.outputs)

    def _unexpected(self) -> list[str]:
        """Tensors that the class ignores; a host that stands in for it is not given them."""
        left_out = self.source.source.ignored if self.model.hosted_from else ()
        return sorted({*(self.strays.unexpected if self.strays else ()), *left_out})

    def _block_facts(self) -> dict[str, Any]:
        return {
            "before": self.source.family.block_of(self.source.config),
            "after": self.model.family.block_of(self.model.config),
            "layers": self.model.reblocked,
            "plain": "auto_map" not in self.raw_config,
        }

    @property
    def layer_of(self) -> dict[str, int]:
        """The layer that computes each changed tensor."""
        return {change.name: change.layer for change in self.changes if change.layer is not None}

    @property
    def rewritten(self) -> list[Change]:
        """Every change of a tensor of ``model``, widening included, with the shape that it ends in."""
        shapes = {tensor.name: tensor.shape for tensor in self.outputs}
        changes = [replace(change, new_shape=shapes[change.name]) for change in self.changes]
        widened = self.widening.shapes.keys() - self.layer_of if self.widening else set()
        for name in shapes:
            if name in widened:
                layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
                changes.append(Change(name, layer, self.model.source.tensors[name].shape, shapes[name]))
        return changes

    def as_json(self) -> dict[str, Any]:
        """The plan as plain JSON, as ``rehead plan --json`` prints it."""
        model, kv = self.model, self.kv
        before = self.source.parameters()
        after = sum(math.prod(tensor.shape) for tensor in self.outputs)
        host = {"host": {"before": model.hosted_from, "after": model.config.model_type}} if model.hosted_from else {}
        return {
            "source": model.source.id,
            "revision": model.source.revision,
            "model_type": self.source.config.model_type,
            **host,
            "layers": len(model.layers),
            "num_attention_heads": model.num_heads,
            "head_dim": model.head_dim,
            "num_key_value_heads": {"before": self.source.num_kv_heads, "after": kv},
            "kv_bytes_per_token": {
                "before": self.source.kv_bytes_per_token(),
                "after": model.kv_bytes_per_token(kv),
            },
            "parameters": {"before": before, "after": after},
            **({"block": self._block_facts()} if model.reblocked else {}),
            "missing": sorted(self.strays.missing) if self.strays else [],
            "unexpected": self._unexpected(),
            "drafts": draft_layers(self.source.source),
            "code_left_out": self.source.source.code_left_out(),
            "exact": self.exact,
            "rounded": self.rounded,
            **({"reinvest": self.widening.facts} if self.widening else {}),
            "options": self.options.as_json(
                self.calibrated, getattr(self.model.config, "max_position_embeddings", None)
            ),
            "config_changes": {
                key: {"before": json_floats(self.source.source.config.get(key)), "after": json_floats(value)}
                for key, value in (dict.fromkeys(self.source.source.config) | self.raw_config).items()
                if self.source.source.config.get(key) != value
            },
            "changes": [
                {"name": c.name, "layer": c.layer, "before": list(c.old_shape), "after": list(c.new_shape)}
                for c in self.rewritten
            ],
            "unchanged_tensors": sum(1 for tensor in self.outputs if tensor.origin is not None),
        }


def make_plan(model: Model, options: ConvertOptions) -> Plan:
    """Work out the conversion and check it against the target class on the meta device. No weight is read.

    Raises:
        UsageError: the number of KV heads does not divide the model's, or exceeds it.
        UnsupportedError: the class cannot express the result, or would not load it.
    """
    source, old = model, model.num_kv_heads
    kv = options.num_key_value_heads or old
    options = options.but(num_key_value_heads=kv)
    if kv > old:
        raise UsageError(
            f"--kv-heads {kv}: the model has {old} KV heads and pooling cannot add any; choose {_divisors(old)}"
        )
    if old % kv:
        raise UsageError(f"--kv-heads {kv}: does not divide the model's {old} KV heads; choose {_divisors(old)}")
    if options.block is not None:
        from rehead.variants.blocks.reblock import reblock

        model = reblock(model, options.block, options.layers, options.plain)
    if options.host is not None or (kv != old and model.family.hosted):
        model = hosted(model, options.host or "auto")
    _refuse_together(source, model, options, kv)
    if kv != old and (reason := model.family.refusal(model.config, kv)):
        raise UnsupportedError(f"{model.source.id}: {reason}")
    raw = _without_remote_code(copy.deepcopy(model.source.config))
    if kv != old:
        model.family.set_kv(raw, kv)
    code = DTYPES[options.dtype]
    if code is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = options.dtype
    config = resolve_config(raw, model.source.id)
    if model.family.num_kv_heads(config) != kv:
        raise UnsupportedError(
            f"{model.source.id}: {model.config.model_type}'s config cannot say {kv} KV heads; choose another number"
        )
    changes: list[Change] = []
    dropped: set[str] = set()
    for layer in model.layers:
        made, gone = _layer_changes(model, options, layer)
        changes += made
        dropped |= gone
    changes += _block_changes(model, options, {change.name for change in changes})
    layer_config, widening = config, None
    if options.reinvest is not None:
        from rehead.convert.reinvest import widen

        widening = widen(model, raw, config, kv, options.reinvest, options.multiple_of, options.seed)
        raw, config = widening.raw_config, widening.config
    outputs = _outputs(model, changes, dropped, code, widening)
    strays = check_loads(
        model.config,
        shapes_of(model.source.stored),
        config,
        {tensor.name: (tensor.dtype, tensor.shape) for tensor in outputs},
    )
    return Plan(source, model, options, changes, outputs, raw, config, layer_config, widening, strays)


def _without_remote_code(raw: dict[str, Any]) -> dict[str, Any]:
    """The config without an ``auto_map`` of somebody's code: transformers' own class loads the result, and remote code
    neither knows of the change nor comes along."""
    from rehead.models.modeling import carried_modules

    if raw.get("auto_map") and not carried_modules(raw):
        raw.pop("auto_map")
    return raw


def _outputs(
    model: Model, changes: list[Change], dropped: set[str], code: str | None, widening: Widening | None
) -> list[OutputTensor]:
    """Every tensor of the result; those whose bytes are the source's say so."""
    shapes: dict[str, tuple[int, ...]] = {change.name: change.new_shape for change in changes}
    shapes |= {name: shape for name, shape in widening.shapes.items() if name not in dropped} if widening else {}
    turned = getattr(model.source, "computed", ())
    outputs = []
    for name, info in model.source.stored.items():
        if name in dropped:
            continue
        cast = code is not None and info.dtype in ("F32", "BF16", "F16", "F64")
        dtype = code if cast and code is not None else info.dtype
        computed = name in shapes or name in turned or dtype != info.dtype
        outputs.append(OutputTensor(name, dtype, shapes.get(name, info.shape), None if computed else name))
    return outputs


def _refuse_together(source: Model, model: Model, options: ConvertOptions, kv: int) -> None:
    """Steps that do not go together in one run."""
    if getattr(model.config, "is_encoder_decoder", False) and kv != source.num_kv_heads:
        kind = model.config.model_type
        if options.needs_calibration:
            raise UnsupportedError(
                f"{kind}: an encoder-decoder cannot be calibrated layer by layer; use --method mean, first, random or "
                "procrustes without --refit and --fit"
            )
        if options.grouping != "contiguous":
            raise UnsupportedError(
                f"{kind}: its layers share a position bias by query head, so heads cannot change places; "
                "use --grouping contiguous"
            )
    if not model.reblocked:
        return
    calibrated = options.refit or options.fit or (kv != source.num_kv_heads and options.needs_calibration)
    if calibrated and model.folded:
        raise UnsupportedError(
            f"{source.source.id}: changing its blocks rewrites its attention too, which cannot be calibrated against "
            "the original in the same run; convert the result in a second run"
        )
    if options.refit:
        for layer in model.reblocked:
            if ffn_writer(model, layer) is None:
                raise UnsupportedError(
                    f"{source.source.id}: layer {layer} has no single FFN output matrix (a mixture of experts, say), "
                    "which --refit would fit; leave --refit out"
                )


def ffn_writer(model: Model, layer: int) -> str | None:
    """The FFN's output matrix below a layer's prefix, without ``.weight``; None where there is no single one."""
    prefix = model.family.layer.format(i=layer)
    return next((stem for stem in _FFN_WRITERS if f"{prefix}{stem}.weight" in model.source.tensors), None)


def _block_changes(model: Model, options: ConvertOptions, known: set[str]) -> list[Change]:
    """The matrices that a refit after a change of blocks rewrites, beyond those that pooling does."""
    if not options.refit:
        return []
    changes = []
    for layer in model.reblocked:
        output = model.family.prefix(layer) + model.family.names.output
        for stem in (output, model.family.layer.format(i=layer) + (ffn_writer(model, layer) or "")):
            for name in (f"{stem}.weight", f"{stem}.bias"):
                if name in model.source.tensors and name not in known:
                    shape = model.source.tensors[name].shape
                    changes.append(Change(name, layer, shape, shape))
    return changes


def moves_queries(options: ConvertOptions) -> bool:
    """Whether queries and the output projection are rewritten too."""
    return options.method not in KV_ONLY or options.grouping != "contiguous" or options.refit or options.fit > 0


def _layer_changes(model: Model, options: ConvertOptions, layer: int) -> tuple[list[Change], set[str]]:
    """(tensors that a layer rewrites, tensors that go with the heads they belonged to)."""
    kv = options.num_key_value_heads or model.num_kv_heads
    if kv == model.num_kv_heads:
        return [], set()
    heads = model.layer_on_meta(layer)
    pooled = mean(heads, kv, MethodContext())
    after = merge(model.family, layer, pooled, model.source.tensors)
    changes = []
    for name, tensor in after.items():
        old = model.source.tensors[name].shape
        if _is_rewritten(model, options, layer, name) or tuple(tensor.shape) != old:
            changes.append(Change(name, layer, old, tuple(tensor.shape)))
    return changes, set(model.layer_tensors(layer)) - after.keys()


def _is_rewritten(model: Model, options: ConvertOptions, layer: int, name: str) -> bool:
    """Whether a tensor's values change even where its shape may not (first and mean rewrite keys and values only)."""
    names, stem = model.family.names, name.removeprefix(model.family.prefix(layer)).rsplit(".", 1)[0]
    if stem in (names.key, names.value, names.key_norm) or stem.startswith(names.key_norm + "."):
        return True
    if model.family.packing != "separate" and stem == names.query:
        return True
    return moves_queries(options)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
