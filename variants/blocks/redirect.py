"""The other form of a block by redirecting what its FFN reads; every module keeps computing what it computes.

A serial block whose second norm is handed the block's own input is the parallel block. A parallel block whose FFN is
handed the norm of input plus attention is the serial one. The layer's own forward pass adds up the halves in both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rehead.errors import UnsupportedError
from rehead.models.live import LayerState
from rehead.models.undo import UndoLog
from rehead.variants.blocks.anatomy import PARALLEL, SERIAL, Block, first_tensor

BLOCK = "_rehead_block"
"""Attribute of a block that holds what was done to it while it has another form."""


class Flow:
    """What one forward pass of one block hands from its first half to its second."""

    def __init__(self, state: LayerState) -> None:
        self.state = state
        self.stream: Tensor | None = None
        self.attention: Tensor | None = None


class _Hook:
    """A hook as an object, so that a copied model gets a flow of its own."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow


class _KeepStream(_Hook):
    """Before the attention's norm: the block's input."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.flow.state.count()
        self.flow.stream = args[0]


class _GiveStream(_Hook):
    """Before the FFN's norm: the block's input in place of what it would read."""

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        stream, self.flow.stream = self.flow.stream, None
        return (stream, *args[1:]) if self.flow.state.enabled else args


class _KeepAttention(_Hook):
    """After attention: its output."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.flow.attention = first_tensor(output)


class _KeepDropped(_Hook):
    """After a dropout of the block: if it dropped from attention's output, that is what is added to the stream."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.flow.attention is not None and args[0] is self.flow.attention:
            self.flow.attention = output


class _GiveSum(_Hook):
    """Before the FFN: the norm of the input with attention's output added."""

    def __init__(self, flow: Flow, norm: nn.Module) -> None:
        super().__init__(flow)
        self.norm = norm

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        flow = self.flow
        stream, attention = flow.stream, flow.attention
        flow.stream = flow.attention = None
        if not flow.state.enabled or stream is None or attention is None:
            return args
        # Past the norm's own hooks, which mark the beginning of a block where both halves share the norm.
        return (self.norm.forward(stream + attention.view_as(stream)), *args[1:])


def redirect(
    block: Block,
    state: LayerState,
    undo: UndoLog,
    attention_norm: nn.Module | None = None,
    ffn_norm: nn.Module | None = None,
) -> None:
    """Give a block its other form.

    Args:
        block: as found in the unpatched model.
        state: read on every call: whether the redirection is enabled.
        undo: takes the hooks.
        attention_norm, ffn_norm: what stands for the block's norms now, if not they themselves.

    Raises:
        UnsupportedError: the block drops from its sum rather than from its halves, which has no serial counterpart.
    """
    flow = Flow(state)
    attention_norm, ffn_norm = attention_norm or block.attention_norm, ffn_norm or block.ffn_norm
    undo.add(attention_norm.register_forward_pre_hook(_KeepStream(flow)).remove)
    if block.form == SERIAL:
        assert state.now == PARALLEL
        undo.add(ffn_norm.register_forward_pre_hook(_GiveStream(flow)).remove)
        return
    dropped = getattr(getattr(block.layer, "config", None), "hidden_dropout", 0.0)
    if dropped and not block.dropouts:
        raise UnsupportedError(
            f"{block.name} drops {dropped} of the sum of both halves, which a serial block cannot; "
            "set config.hidden_dropout to 0"
        )
    undo.add(block.attention.register_forward_hook(_KeepAttention(flow)).remove)
    for dropout in dict.fromkeys(block.dropouts):
        undo.add(dropout.register_forward_hook(_KeepDropped(flow)).remove)
    undo.add(block.ffn.register_forward_pre_hook(_GiveSum(flow, ffn_norm)).remove)
