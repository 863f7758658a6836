"""A longer context on a live model: its attention is handed the rotary angles that the stretched config gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rehead.attention.discover import find_attention
from rehead.errors import UnsupportedError, first_line
from rehead.models import probing
from rehead.models.families.resolve import table_entry
from rehead.models.families.spec import CHANGING
from rehead.models.live import LayerState, enclosing_layer
from rehead.models.modeling.modeling_rehead_cache import passed_cache
from rehead.models.predictions import predict
from rehead.models.stale import refuse_stale_keys
from rehead.models.undo import UndoLog
from rehead.variants.context.classes import ROTATING, named_by, new_parameters, rotating, said_length, trained_length
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.rope import stretch
from rehead.variants.context.tables import nothing_to_stretch
from rehead.variants.layer_choice import check_known


class _Angles(tuple):  # type: ignore[type-arg]
    """What a rotary embedding gave, with what the stretched one gives beside it."""

    longer: tuple[Tensor, Tensor]


class _Positions:
    """What is known of the running forward pass: tokens in its cache before it."""

    cached = 0


def redirect(
    model: nn.Module, options: ContextOptions, asked: set[int] | None, undo: UndoLog, memory: dict[str, Any]
) -> list[LayerState]:
    """Give layers the angles of a longer context.

    Raises:
        UsageError: not longer, or layers that do not rotate.
        UnsupportedError: a class whose attention is not handed its rotary angles, or that has none.
    """
    whole: Any = model
    config = whole.config.get_text_config(decoder=True)
    kind = str(config.model_type)
    family = table_entry(config)
    if family is None:
        raise UnsupportedError(f"{kind}: how its heads rotate is not known; see `rehead families`")
    if not rotating(config, family):
        raise UnsupportedError(nothing_to_stretch(kind) or f"{kind}: has a table of positions; convert it instead")
    if getattr(config, "layer_rope_theta", None):
        raise UnsupportedError(f"{kind}: each of its layers has a theta of its own; convert it by ntk or drope")
    layers = rotating(config, family)
    check_known(asked or set(), layers, ROTATING)
    chosen = named_by(config, options, layers)
    trained = trained_length(config, options)
    stretch(trained, options)
    rotaries = [(name, part) for name, part in model.named_modules() if "RotaryEmbedding" in type(part).__name__]
    after = None if options.rope == "drope" else _stretched_config(config, family, options)
    positions = _Positions()
    for name, rotary in rotaries:
        longer = None if after is None else _made_again(kind, name, rotary, after)
        hook = _Hook(longer, options, trained, positions)
        undo.add(rotary.register_forward_hook(hook, with_kwargs=True).remove)
    body: Any = getattr(model, "base_model", model)
    undo.add(body.register_forward_pre_hook(_counting(positions), with_kwargs=True).remove)
    states = []
    found = find_attention(model)
    for name, module in found.interface + found.own:
        place = enclosing_layer(model, name)
        if place is None or place[1] not in chosen:
            continue
        said = f"{options.rope}, {options.tokens} tokens"
        state = LayerState(name, place[1], type(module).__name__, "rope", said, "redirected", options=options)
        undo.add(module.register_forward_pre_hook(_handed(state), with_kwargs=True).remove)
        states.append(state)
    _check_runs(model, kind, states, options.rope)
    memory["untouched"] = [name for name, _ in found.interface + found.own if name not in {s.name for s in states}]
    return states


def _stretched_config(config: Any, family: Any, options: ContextOptions) -> Any:
    after = copy.deepcopy(config)
    after.rope_parameters = new_parameters(config, family, options)
    if hasattr(after, "original_max_position_embeddings"):  # Phi 3, which reads it there
        after.original_max_position_embeddings = trained_length(config, options)
    if (length := said_length(options)) is not None:
        after.max_position_embeddings = length
    try:
        after.validate_rope()  # what a checkpoint's config is told when it is read
    except (KeyError, TypeError, ValueError) as error:  # Phi-3.5-MoE wants further keys of any kind but the default
        raise UnsupportedError(
            f"{config.model_type}: its class does not compute {options.rope} ({first_line(error, 100)}); give rope=ntk"
        ) from None
    return after


def _made_again(kind: str, name: str, rotary: nn.Module, config: Any) -> nn.Module:
    """A rotary embedding of the same class under another config, on the same device."""
    place = next((buffer.device for buffer in rotary.buffers()), torch.device("cpu"))
    cls: Any = type(rotary)
    try:
        made: nn.Module = cls(config).to(place)
    except Exception as error:  # of whatever a class asks of its config
        raise UnsupportedError(
            f"{kind}: {name} cannot be made from another config ({type(error).__name__}: {first_line(error, 100)}); "
            "convert it instead"
        ) from None
    return made


class _Hook:
    """After a rotary embedding: the stretched one's angles beside its own, and a refusal of stale caches."""

    def __init__(self, longer: nn.Module | None, options: ContextOptions, trained: int, positions: _Positions) -> None:
        self.longer, self.options, self.trained, self.positions = longer, options, trained, positions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not (isinstance(output, tuple) and len(output) == 2):
            return output
        if self.options.rope in (*CHANGING, "fitted"):
            self._refuse_stale(args, kwargs)
        both = _Angles(output)
        if self.longer is None:
            both.longer = (torch.ones_like(output[0]), torch.zeros_like(output[1]))
        else:
            both.longer = self.longer(*args, **kwargs)
        return both

    def _refuse_stale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a text that outgrows the original length over a cache of keys rotated for a shorter one."""
        cached = self.positions.cached
        places = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if not cached or places is None:
            return
        end = int(places.max()) + 1
        refuse_stale_keys(self.options.rope, self.trained, cached, end - places.shape[-1], end)


def _counting(positions: _Positions) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = passed_cache(kwargs)
        positions.cached = 0 if cache is None else int(cache.get_seq_length())

    return before


def _handed(state: LayerState) -> Any:
    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        angles = kwargs.get("position_embeddings")
        if not isinstance(angles, _Angles):
            return None
        state.count()
        if not state.enabled:
            return None
        return args, {**kwargs, "position_embeddings": angles.longer}

    return before


def _check_runs(model: nn.Module, kind: str, states: list[LayerState], rope: str) -> None:
    """Refuse a class whose attention is not handed these angles."""
    with probing.frozen(model):
        predict(model, {"input_ids": probing.probe_tokens(model, 4, 1, seed=0)})
    silent = [state for state in states if not state.calls]
    for state in states:
        state.calls = 0
    if silent or not states:
        ways = "give another rope" if rope == "drope" else "convert it instead"
        raise UnsupportedError(f"{kind}: its attention makes its rotary angles itself; {ways}")
