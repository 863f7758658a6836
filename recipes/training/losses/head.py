"""How a model gets its logits from its final hidden states, found on the live model and proved there.

The output embedding (``lm_head``) is called with hidden states of our own, on a ladder of sizes, inside the model's
own forward pass: what comes out as logits shows the scale and the soft cap that the model puts behind it, whatever its
config calls them. The figures that explain it must stand in the config, exactly, and the formula must then give the
same logits on every rung.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError, first_line
from rehead.models.live import evaluating

# Standard deviation of the raw logits on each rung: one shows the scale, the next the bend, the last the cap.
_LADDER = (0.05, 1.0, 20.0, 2000.0)
_ROWS = 4


@dataclass(frozen=True)
class Shape:
    """From raw logits to logits: ``cap * tanh(scale * raw / cap)``, of the first ``vocabulary`` of them."""

    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from raw logits [..., vocabulary], in their dtype."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


@dataclass(frozen=True)
class Head:
    """A model's way from final hidden states to logits.

    Attributes:
        module: the output embedding; its parameters are read at each use, since a sharded model exchanges them.
        shape: scale, soft cap, vocabulary.
        linear: the module is a plain ``weight`` and perhaps a ``bias``; otherwise (LoRA, a quantised or deeper head) it
            is called, a chunk of tokens at a time.
        hidden_scale: factor between the base model's hidden states and the module's input.
    """

    module: nn.Module
    shape: Shape
    linear: bool = True
    hidden_scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden], a view of the parameter."""
        weight: Any = self.module.weight
        return weight if weight.shape[0] == self.shape.vocabulary else weight[: self.shape.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """[vocabulary], a view of the parameter, or None."""
        bias: Any = getattr(self.module, "bias", None)
        return None if bias is None else bias[: self.shape.vocabulary]

    def narrowed(self, vocabulary: int) -> Head:
        """The same head with the rows past ``vocabulary`` left out (padding of the vocabulary)."""
        return replace(self, shape=replace(self.shape, vocabulary=min(vocabulary, self.shape.vocabulary)))

    def raw(self, hidden_states: Tensor) -> Tensor:
        """Raw logits [..., vocabulary] of the module's input [..., hidden], through the module itself."""
        return self.module(hidden_states)[..., : self.shape.vocabulary]


def transformer(model: nn.Module) -> Any:
    """The transformers model inside ``model``, which may be a PEFT model around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_model(model: nn.Module) -> nn.Module:
    """The part of a causal language model that gives final hidden states.

    Raises:
        UnsupportedError: the model has no such part.
    """
    inner = transformer(model)
    base = getattr(inner, "base_model", None)
    if base is None or base is inner:
        # Some classes keep it under another name than the one they state.
        base = getattr(inner, "model", None)
    if base is None:
        raise UnsupportedError(
            f"{type(inner).__name__}: no base model apart from its head; give a model of AutoModelForCausalLM"
        )
    return base


def final_hidden(output: Any) -> Tensor:
    """Final hidden states [B, S, hidden] of what a base model returned."""
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def find_head(model: nn.Module) -> Head:
    """Find how ``model`` gets logits from final hidden states, and prove it on the model itself.

    Two forward passes of sixteen tokens, without dropout, on the device that the model is on. Call it before the model
    is sharded.

    Raises:
        UnsupportedError: the model has no output embedding, puts something between base model and head, or behind the
            head, that no number in its config explains.
    """
    inner = transformer(model)
    name = type(inner).__name__
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None:
        raise UnsupportedError(f"{name}: has no output embedding; give a model of AutoModelForCausalLM")
    base = base_model(model)
    try:
        with evaluating(inner):
            return _find(inner, base, module)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"{name}: does not run on token ids alone ({first_line(error)}); give a decoder of AutoModelForCausalLM"
        ) from error


def _find(model: Any, base: nn.Module, module: nn.Module) -> Head:
    name, numbers = type(model).__name__, _numbers(model.config)
    entered, raw, logits = _probe(model, module, None)
    hidden = final_hidden(base(input_ids=_ids(model), use_cache=False)).flatten(0, -2).to(entered.dtype)
    tolerance = 1e-4 if next(module.parameters()).dtype in (torch.float32, torch.float64) else 2e-2
    hidden_scale = None
    if hidden.shape == entered.shape:
        fitted = float((entered * hidden).sum() / hidden.square().sum())
        hidden_scale = _named(fitted, _scales(numbers, model.config), tolerance)
    if hidden_scale is None or not _same(entered, hidden * hidden_scale, tolerance):
        raise UnsupportedError(
            f"{name}: its head does not read its base model's last hidden states; chunked losses cannot be used"
        )
    spread = float(raw.std() / entered.std())
    size = torch.tensor(_LADDER).repeat_interleave(_ROWS)
    noise = torch.randn(len(size), entered.shape[-1], generator=torch.Generator().manual_seed(0))
    rungs = (noise * size[:, None] / max(spread, 1e-6)).to(entered.device)
    entered, raw, logits = _probe(model, module, rungs)
    shape = _shape(raw, logits, numbers, tolerance)
    if shape is None or not _same(shape.apply(raw[..., : shape.vocabulary]), logits, tolerance):
        raise UnsupportedError(
            f"{name}: does something to its logits that no number in its config explains; chunked losses cannot be used"
        )
    head = Head(module, shape, _is_linear(module), hidden_scale)
    if head.linear:
        product = entered @ head.weight.to(entered.dtype).T
        product = product if head.bias is None else product + head.bias.to(entered.dtype)
        head = replace(head, linear=_same(product, raw[..., : shape.vocabulary], tolerance))
    return head


def _ids(model: Any) -> Tensor:
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, size, (1, len(_LADDER) * _ROWS), generator=torch.Generator().manual_seed(1))
    return ids.to(model.get_input_embeddings().weight.device)


def _probe(model: Any, module: nn.Module, replacement: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of the head and the model's logits in one forward pass, float32 or wider, [N, ...] each."""
    seen: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple) -> tuple:
        value = args[0] if replacement is None else replacement.to(args[0].dtype).expand(args[0].shape)
        seen["entered"] = value
        return (value, *args[1:])

    def after(_: nn.Module, args: tuple, output: Tensor) -> None:
        # A copy: some models cap their logits in place.
        seen["raw"] = output.clone()

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        logits = model(input_ids=_ids(model), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if "raw" not in seen:
        raise UnsupportedError(
            f"{type(model).__name__}: does not call its output embedding; chunked losses cannot be used"
        )
    found = [seen["entered"], seen["raw"], logits]
    return tuple(item.flatten(0, -2).to(torch.promote_types(item.dtype, torch.float32)) for item in found)  # type: ignore[return-value]


def _shape(raw: Tensor, logits: Tensor, numbers: list[float], tolerance: float) -> Shape | None:
    """Scale and cap, read off the ladder and found again in the config; None when they are not there."""
    vocabulary = min(raw.shape[-1], logits.shape[-1])
    raw = raw[..., :vocabulary]
    low, high = slice(0, _ROWS), slice(-_ROWS, None)
    scale = _named(float((logits[low] * raw[low]).sum() / raw[low].square().sum()), _scales(numbers), tolerance)
    if scale is None:
        return None
    highest, linear = float(logits[high].abs().max()), float((scale * raw[high]).abs().max())
    if highest > 0.9 * linear:
        return Shape(vocabulary, scale)
    cap = _named(highest, numbers, tolerance)
    return None if cap is None else Shape(vocabulary, scale, cap)


def _numbers(config: Any) -> list[float]:
    """Every positive number in a config, its parts included."""

    def walk(value: Any) -> Iterator[float]:
        if isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield float(value)

    return sorted(set(walk(config.to_dict())))


def _scales(numbers: list[float], config: Any = None) -> list[float]:
    """What a factor may be: 1, a number of the config, one over it, or one in relation to the hidden size."""
    size = getattr(config, "hidden_size", None)
    return [1.0, *numbers, *(1 / n for n in numbers), *(n / size for n in numbers if size)]


def _named(value: float, candidates: list[float], tolerance: float) -> float | None:
    """1 if it is that near, else the nearest candidate within the tolerance, or None."""
    near = [c for c in candidates if abs(c - value) <= tolerance * abs(value)]
    return 1.0 if 1.0 in near else min(near, key=lambda c: abs(c - value), default=None)


def _same(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether every row agrees, by its norm."""
    distance = (got - want).norm(dim=-1)
    return bool((distance <= tolerance * want.norm(dim=-1) + 1e-30).all())


def _is_linear(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return isinstance(module, nn.Linear) and names <= {"weight", "bias"} and not module._forward_pre_hooks
