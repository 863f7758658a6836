"""Where the blocks of a live model are, and what form they have: read off one small forward pass, never guessed.

A block's parts are recognised by what flows between them. Attention reads a norm of the block's input; the FFN reads a
norm of the block's input (parallel) or of the input with the attention's output added (serial); both outputs are added
to the input. What does not add up to that, to rounding, is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rehead.attention.discover import find_attention
from rehead.errors import ReheadError, UnsupportedError, UsageError, first_line
from rehead.models import probing
from rehead.models.live import enclosing_layer
from rehead.models.predictions import predict

SERIAL, PARALLEL = "serial", "parallel"
FORMS = (SERIAL, PARALLEL)

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative difference that counts as rounding, when sums are recognised."""

PROBE_TOKENS = 8


@dataclass
class Block:
    """One pre-norm block of a live model.

    Attributes:
        index: its place in the stack, 0-based.
        name: the layer's name in the model.
        layer: the whole block.
        form: ``"serial"`` or ``"parallel"``, as the model computes it.
        attention_norm, attention, ffn_norm, ffn: its parts; both norms are one module where the block shares it.
        attention_readers, ffn_readers: names, within attention and FFN, of the matrices that read the norm's output.
        attention_writer, ffn_writer: names of the matrices that give their outputs, or None where it is none.
        dropouts: the block's own dropout modules.
    """

    index: int
    name: str
    layer: nn.Module
    form: str
    attention_norm: nn.Module
    attention: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module
    attention_readers: list[str] = field(default_factory=list)
    ffn_readers: list[str] = field(default_factory=list)
    attention_writer: str | None = None
    ffn_writer: str | None = None
    dropouts: list[nn.Module] = field(default_factory=list)

    @property
    def shared_norm(self) -> bool:
        """Whether one norm serves both halves."""
        return self.attention_norm is self.ffn_norm

    def child_name(self, module: nn.Module) -> str:
        """Name of a part within the block."""
        return next(name for name, child in self.layer.named_children() if child is module)


@dataclass
class _Call:
    """One call of a module: its first tensor in (itself, for identity) and out (a copy: sums may be in place)."""

    module: nn.Module
    given: Tensor
    result: Tensor


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first of a tuple or list."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def hidden_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments."""
    found = kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else first_tensor(args)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """Calls of ``modules`` made inside the context, in order of their ends."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given, result = hidden_argument(args, kwargs), first_tensor(output)
        if given is not None and result is not None:
            calls.append(_Call(module, given, result.detach().clone()))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain product with a weight: a Linear, a model's own name for one, or GPT-2's Conv1D.

    Adapters and quantised layers compute something more; they may subclass Linear, but not within transformers' models.
    """
    cls = type(module)
    own = isinstance(module, nn.Linear) and cls.__module__.startswith("transformers.models.")
    return cls in (nn.Linear, Conv1D) or own


def check_live(model: nn.Module) -> None:
    """Refuse models whose blocks cannot be changed where they are; changes nothing.

    Raises:
        UsageError: not a module.
        UnsupportedError: quantised, tensor-parallel or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"patch_model wants a loaded model, not {type(model).__name__}; call from_pretrained first")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise UnsupportedError("the model is quantised, and its blocks are fixed; load it without quantization_config")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedError("the model is split over GPUs by tensor parallelism; load it without tp_plan")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights before patching")
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise UnsupportedError(f"{name} is split over GPUs by tensor parallelism; load the model without tp_plan")
        if not parameter.is_floating_point():
            raise UnsupportedError(f"{name} is quantised ({parameter.dtype}); load the model without quantisation")


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model's one stack of layers that have attention, in order.

    Runs one forward pass over a few tokens, and changes nothing.

    Args:
        model: a live, unpatched causal model.

    Raises:
        UnsupportedError: there is no such stack, or its blocks are neither serial nor parallel; the reason is named.
        UsageError: the model cannot be probed with token ids.
    """
    layers = _layers(model)
    parts = {name: list(layer.children()) for name, (layer, _) in layers.items()}
    matrices = [m for layer, _ in layers.values() for m in layer.modules() if is_matrix(m)]
    watched = [module for name in layers for module in (layers[name][0], *parts[name])]
    input_ids = probing.probe_tokens(model, PROBE_TOKENS, 2, seed=0)
    try:
        with probing.frozen(model), recorded([*watched, *matrices]) as calls:
            predict(model, {"input_ids": input_ids})
    except ReheadError:
        raise
    except Exception as error:
        # Whatever a model of any class may do on a few tokens, it must not pass for a fault of the caller's.
        raise UnsupportedError(
            f"{type(model).__name__} does not run on a probe of {input_ids.shape[1]} tokens "
            f"({type(error).__name__}: {first_line(error, 100)}), so its blocks are unknown; use another model class"
        ) from error
    blocks = []
    for name, (layer, attention) in layers.items():
        own = set(map(id, layer.modules()))
        mine = [call for call in calls if id(call.module) in own]
        if not any(call.module is layer for call in mine):
            raise UnsupportedError(f"{name} did not run on the probe, so its form is unknown; use a decoder-only model")
        blocks.append(_block(name, layer, attention, mine))
    return blocks


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Layer name -> (layer, its child that holds attention); layers are members of a ``ModuleList``."""
    found = find_attention(model)
    layers: dict[str, tuple[nn.Module, nn.Module]] = {}
    stacks: set[str] = set()
    for name, _ in found.interface + found.own:
        place = enclosing_layer(model, name)
        if place is None or place[0] == name:
            continue
        key = place[0]
        layer = model.get_submodule(key)
        child = layer.get_submodule(name[len(key) + 1 :].partition(".")[0])
        if key in layers and layers[key][1] is not child:
            raise UnsupportedError(f"{key} has more than one attention (cross-attention?); use a decoder-only model")
        layers[key] = (layer, child)
        stacks.add(key.rpartition(".")[0])
    if not layers:
        raise UnsupportedError(
            f"{type(model).__name__} has no stack of layers with attention; use a decoder-only model"
        )
    if len(stacks) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} has more than one stack of layers ({', '.join(sorted(stacks))}); "
            "patch a model with one"
        )
    return layers


def _close(a: Tensor, b: Tensor, added: Tensor) -> bool:
    """Equal to rounding: a share of what was ``added``, and what the sum itself is rounded by."""
    if a.shape != b.shape:
        return False
    share, eps = ROUNDING.get(a.dtype, 1e-4), torch.finfo(a.dtype).eps
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) <= share * float(added.double().norm()) + 4 * eps * float(a.norm())


def _factor(whole: Tensor, part: Tensor) -> float:
    """The number that comes closest to ``whole = number * part``."""
    whole, part = whole.detach().double().flatten(), part.double().flatten()
    square = float(part @ part)
    return float(whole @ part) / square if square > 0 else 1.0


def _is_matrix_module(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _block(name: str, layer: nn.Module, attention: nn.Module, calls: list[_Call]) -> Block:
    """Read one block off its calls, or refuse it."""

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} ({type(layer).__name__}) is neither a serial nor a parallel pre-norm block: {reason}; "
            "patch a model whose blocks are x + Attn(N x), then + MLP(N x)"
        )

    children = list(layer.children())
    whole = next(call for call in calls if call.module is layer)
    direct = [call for call in calls if any(call.module is child for child in children)]
    x, y = whole.given, whole.result
    attend = next((call for call in direct if call.module is attention), None)
    if attend is None:
        raise refuse("its attention takes no hidden states of its own")
    ffns = [c for c in direct if c.module is not attention and _is_matrix_module(c.module)]
    if len(ffns) != 1:
        names = [type(c.module).__name__ for c in ffns]
        raise refuse(f"its FFN is not one module ({', '.join(names) or 'none'})")
    ffn = ffns[0]
    norms = [c for c in direct if c.module is not attention and c.module is not ffn.module]
    before_attention = next((c for c in norms if torch.equal(c.result, attend.given)), None)
    if before_attention is None or before_attention.given is not x:
        raise refuse("attention does not read a norm of the block's input")
    before_ffn = next((c for c in reversed(norms) if torch.equal(c.result, ffn.given)), None)
    if before_ffn is None:
        raise refuse("its FFN does not read a norm's output")
    if any(t.numel() != x.numel() for t in (y, before_ffn.given, attend.result, ffn.result)):
        raise refuse("its halves do not have the shape of its input")
    # Experts may hand back a flat list of tokens.
    first, second = attend.result.view_as(x), ffn.result.view_as(x)
    if before_ffn.module is before_attention.module or before_ffn.given is x:
        form, total = PARALLEL, x + first + second
    else:
        form, stream = SERIAL, before_ffn.given
        if not _close(stream, x + _factor(stream - x, first) * first, first):
            raise refuse("something else than attention's output is added to the input (a norm after attention?)")
        total = stream + _factor(y - stream, second) * second
    if not _close(y, total, second):
        raise refuse("something else than both outputs is added to the input (a norm after the FFN?)")
    return Block(
        index=int(name.rpartition(".")[2]),
        name=name,
        layer=layer,
        form=form,
        attention_norm=before_attention.module,
        attention=attention,
        ffn_norm=before_ffn.module,
        ffn=ffn.module,
        attention_readers=_readers(attend, calls),
        ffn_readers=_readers(ffn, calls),
        attention_writer=_writer(attend, calls),
        ffn_writer=_writer(ffn, calls),
        dropouts=[child for child in children if isinstance(child, nn.Dropout)],
    )


def _matrix_calls(part: _Call, calls: list[_Call]) -> list[tuple[str, _Call]]:
    names = {id(module): name for name, module in part.module.named_modules()}
    return [(names[id(c.module)], c) for c in calls if id(c.module) in names and is_matrix(c.module)]


def _readers(part: _Call, calls: list[_Call]) -> list[str]:
    """Matrices of a part that read its input as it came."""
    return [
        name
        for name, c in _matrix_calls(part, calls)
        if c.given.data_ptr() == part.given.data_ptr() and c.given.numel() == part.given.numel()
    ]


def _writer(part: _Call, calls: list[_Call]) -> str | None:
    """The matrix whose product is the part's output."""
    for name, c in reversed(_matrix_calls(part, calls)):
        if c.result.numel() == part.result.numel() and torch.equal(c.result.flatten(), part.result.flatten()):
            return name
    return None
