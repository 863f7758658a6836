"""What a live model's attention layers cache, read off the calls that they make."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rehead.attention.call import AttentionCall
from rehead.attention.layer import AttentionLayer
from rehead.errors import UnsupportedError
from rehead.models import probing
from rehead.models.layout import LayerLayout
from rehead.models.live import LayerState
from rehead.models.predictions import predict


def layouts(model: nn.Module, layers: Sequence[AttentionLayer], tokens: int = 4) -> dict[str, LayerLayout]:
    """The layout of each attention layer by its name, from one forward pass over a few random tokens.

    Args:
        model: with the tiled attention installed.
        layers: of it.
        tokens: in the pass.

    Raises:
        UnsupportedError: a layer does not run.
    """
    seen: dict[str, AttentionCall] = {}

    def watch(layer: AttentionLayer) -> tuple:
        def note(call: AttentionCall, options: object, state: object, compute):  # type: ignore[no-untyped-def]
            seen[layer.name] = call
            return compute(call)

        return note, LayerState(layer.name, layer.index, layer.module, layer.was, layer.was)

    for layer in layers:
        layer.variants.append(watch(layer))
    try:
        with probing.frozen(model):
            predict(model, {"input_ids": probing.probe_tokens(model, tokens, 1, seed=0)})
    finally:
        for layer in layers:
            layer.variants.pop()
    silent = next((layer.name for layer in layers if layer.name not in seen), None)
    if silent is not None:
        raise UnsupportedError(f"{silent} did not run on a probe, so its heads are unknown; name other layers")
    return {
        name: LayerLayout(
            index=next(layer.index or 0 for layer in layers if layer.name == name),
            num_heads=call.query.shape[1],
            num_key_value_heads=call.key.shape[1],
            key_dim=call.key.shape[-1],
            value_dim=call.value.shape[-1],
            window=call.window,
            itemsize=call.key.element_size(),
        )
        for name, call in seen.items()
    }
