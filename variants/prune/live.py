"""Fewer query heads on a live model: the output projection reads a prediction in place of the heads that are gone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rehead.attention.discover import find_attention
from rehead.errors import UnsupportedError
from rehead.models import probing
from rehead.models.families.resolve import table_entry
from rehead.models.families.spec import Family
from rehead.models.live import LayerState, enclosing_layer
from rehead.models.predictions import predict
from rehead.models.undo import UndoLog
from rehead.models.watch import hooked
from rehead.variants.layer_choice import check_known
from rehead.variants.prune.options import PruneOptions, check_heads, refusal
from rehead.variants.prune.solve import HeadOutputs, least_needed, predictor

if TYPE_CHECKING:
    from rehead.variants.stack import LiveVariant

MIX = "predictor"
"""What a changed layer's output projection reads instead of z is this matrix times z."""


def redirect(
    model: nn.Module, options: PruneOptions, asked: set[int] | None, undo: UndoLog, memory: dict[str, Any]
) -> list[LayerState]:
    """Take heads out of layers. Those that text chooses go once it has been read (:func:`calibrate`).

    Raises:
        UsageError: more heads than can go, or layers that the model does not have.
        UnsupportedError: a class whose output projections Rehead does not know, or heads that belong together.
    """
    if not options.heads:
        return []
    config, family = _family(model)
    check_heads(options.heads, family.num_heads(config), family.num_kv_heads(config))
    if (reason := refusal(family, config)) is not None:
        raise UnsupportedError(f"{config.model_type}: {reason}")
    found, states = find_attention(model), []
    places = [(name, module, enclosing_layer(model, name)) for name, module in found.interface + found.own]
    check_known(asked or set(), sorted({place[1] for _, _, place in places if place is not None}))
    for name, module, place in places:
        if place is None or (asked is not None and place[1] not in asked):
            continue
        state = LayerState(
            name, place[1], type(module).__name__, "all heads", f"{options.heads} of each group fewer", "redirected"
        )
        state.options = options
        output = _output(module, family, name)
        kept = memory.setdefault(MIX, {})
        if options.by == "weights":
            kept[name] = _mix(output, family, config, options, None)
        if name in kept:
            state.tensors[MIX] = kept[name]
        undo.add(output.register_forward_pre_hook(_Hook(state)).remove)
        states.append(state)
    memory["untouched"] = [name for name, _, _ in places if name not in {state.name for state in states}]
    return states


@torch.no_grad()
def calibrate(live: LiveVariant, tokens: Tensor, sequential: bool) -> None:
    """Choose the heads that go by what the layers' text shows, and predict their outputs from the others'.

    One pass over the text, as the model is without the variant; ``sequential`` changes nothing.
    """
    config, family = _family(live.model)
    outputs = {state.name: _output(live.model.get_submodule(state.name), family, state.name) for state in live.states}
    grams = _grams(live.model, outputs, tokens)
    for state in live.states:
        mix = _mix(outputs[state.name], family, config, state.options, grams[state.name])
        state.tensors[MIX] = live._memory[MIX][state.name] = mix


class _Hook:
    """Before an output projection: what it reads without the heads that are gone."""

    def __init__(self, state: LayerState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.state.count()
        mix = self.state.tensors.get(MIX)
        if mix is None or not self.state.enabled:
            return args
        return (args[0] @ mix.to(args[0]).T, *args[1:])


def _grams(model: nn.Module, outputs: dict[str, nn.Module], tokens: Tensor) -> dict[str, Tensor]:
    """E[z z^T] of layers by name, over texts, int [B, S]."""
    parts = {name: HeadOutputs(1) for name in outputs}
    with ExitStack() as stack:
        for name, output in outputs.items():
            see = lambda _, args, part=parts[name]: part.see(args[0])  # noqa: E731
            stack.enter_context(hooked(output.register_forward_pre_hook(see)))
        stack.enter_context(probing.frozen(model))
        for texts in probing.batches(tokens, model):
            predict(model, {"input_ids": texts})
    return {name: part.mean() for name, part in parts.items()}


def _mix(output: Any, family: Family, config: Any, options: PruneOptions, gram: Tensor | None) -> Tensor:
    """The matrix on what an output projection reads, [H D, H D]."""
    num, dim = family.num_heads(config), family.head_dim(config)
    weight = output.weight.T if family.transposed else output.weight
    dropped = least_needed(weight.unflatten(1, (num, dim)), gram, family.num_kv_heads(config), options.heads)
    return predictor(gram, dropped, num, dim).to(weight.device)


def _family(model: Any) -> tuple[Any, Family]:
    config = model.config.get_text_config(decoder=True)
    family = table_entry(config)
    if family is None:
        raise UnsupportedError(f"{config.model_type}: Rehead does not know its attention's layout; leave prune out")
    return config, family


def _output(module: nn.Module, family: Family, name: str) -> nn.Module:
    try:
        return module.get_submodule(family.names.output)
    except AttributeError:
        raise UnsupportedError(
            f"{name} has no {family.names.output}, which the heads write to; name other layers"
        ) from None
