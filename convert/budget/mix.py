"""A live model in which each layer can stand in any of its forms, switched and measured without writing anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rehead.attention.interface import register
from rehead.convert.budget.library import Choice, Option
from rehead.models import probing
from rehead.models.by_heads import tensors_of
from rehead.models.distance import Distances, distances
from rehead.models.heads import Heads
from rehead.models.linalg import fast_products
from rehead.models.model import Model
from rehead.models.predictions import Predictions, predict
from rehead.models.rewrite import Changed, LayerForm
from rehead.variants.stack import LiveVariant, live_variant

#: Tokens in one forward pass of the whole model.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
#: Right answers of the original's at least, to say which share of them is kept.
_FEWEST = 8


@dataclass(frozen=True)
class Sample:
    """Texts of one kind to measure on.

    Attributes:
        name: what it shows: ``text`` for running text, or a probe's name.
        tokens: int64 [N, S].
        scored: bool [S], positions whose predictions are compared.
        answers: int64 [N, scored], the tokens to predict there; None for running text.
    """

    name: str
    tokens: Tensor
    scored: Tensor
    answers: Tensor | None = None

    @property
    def count(self) -> int:
        """Predictions that are compared."""
        return len(self.tokens) * int(self.scored.sum())

    def batches(self, device: torch.device) -> Iterator[Tensor]:
        """The tokens on a device, a few rows at a time."""
        rows = max(1, _BATCH_TOKENS.get(device.type, 2048) // self.tokens.shape[1])
        return (part.to(device) for part in self.tokens.split(rows))


@dataclass(frozen=True)
class Measured:
    """What a choice does to a model.

    Attributes:
        kl: nats per token on running text, original to changed.
        recall_kl: the mean of the same over the probes' predictions; 0 without probes.
        recalled: share of the probes' answers that the changed model gives, of those that the original gives; None
            without probes, or where the original gives so few that a share of them says nothing.
    """

    kl: float
    recall_kl: float = 0.0
    recalled: float | None = None

    @property
    def loss(self) -> float:
        """What a choice is judged by: retrieval, which running text hardly shows, counts as much as the text."""
        return self.kl + self.recall_kl


@dataclass
class Form:
    """A layer in one option, ready to be switched to.

    Attributes:
        weights: tensors by the names of the attention module's parameters, in its own shapes.
        module: a module that replaces the attention, or None.
        state: the variant's own tensors in this layer.
    """

    weights: dict[str, Tensor]
    module: nn.Module | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Mix:
    """A live model and its layers' forms. A context manager: outside it the model is as it was, bit for bit.

    Args:
        live: the model, on one device, in evaluation mode.
        model: the same as an open checkpoint.
        options: every option that will be used.
    """

    def __init__(self, live: Any, model: Model, options: Sequence[Option]) -> None:
        self.live, self.model = live, model
        self.device = next(live.parameters()).device
        #: Whether products are taken in TF32.
        self.half = model.fast_on(self.device)
        self.forms: dict[tuple[int, str], Form] = {}
        self._attending: dict[str, LiveVariant] = {}
        self._states: dict[tuple[str, int], Any] = {}
        self._wanted = {
            option.variant.name: option.options
            for option in options
            if option.variant is not None and option.variant.attend is not None
        }
        self._undo = ExitStack()

    def __enter__(self) -> Mix:
        register()
        self._undo.enter_context(probing.frozen(self.live))
        for name, options in self._wanted.items():
            assert options is not None
            live = live_variant(self.live, name, **options.model_dump(exclude={"layers"}))
            live.apply()
            self._undo.callback(live.revert)
            for state in live.states:
                state.enabled = False
                if state.index is not None:
                    self._states[name, state.index] = state
            self._attending[name] = live
        return self

    def __exit__(self, *exc: Any) -> None:
        self._undo.close()

    def attention(self, layer: int) -> nn.Module:
        """The attention module that a layer has now."""
        return self.live.get_submodule(self._path(layer))

    def output(self, layer: int) -> nn.Module:
        """The output projection that a layer has now."""
        return self.attention(layer).get_submodule(self.model.family.names.output)

    def add(self, layer: int, option: Option, form: LayerForm | None, changed: Changed | None) -> None:
        """Keep a layer's form in an option.

        Args:
            layer: the layer's index.
            option: the option.
            form: how it changes weights; None for one that changes what is attended to alone.
            changed: the closed form of the layer.
        """
        if form is None or changed is None:
            self.forms[layer, option.name] = Form({})
            return
        prefix, weights = self.model.family.prefix(layer), changed.weights
        if isinstance(weights, Heads):
            weights = tensors_of(self.model.family, layer, as_many_heads(weights, self.model.num_kv_heads),
                                 self.model.source.tensors)  # fmt: skip
        named = {name.removeprefix(prefix): tensor.to(self.device, torch.float32) for name, tensor in weights.items()}
        if form.module is None:
            parameters = dict(self.attention(layer).named_parameters())
            self.forms[layer, option.name] = Form(_in_old_shapes(named, parameters, self.model.head_dim))
            return
        module = form.module().to_empty(device=self.device)
        for name, tensor in named.items():
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        self.forms[layer, option.name] = Form({}, module)

    @contextmanager
    def at(self, layer: int, option: Option) -> Iterator[None]:
        """Inside the block one layer stands in an option."""
        if option.variant is None:
            yield
            return
        form = self.forms[layer, option.name]
        with ExitStack() as undo:
            state = self._states.get((option.kind, layer))
            if state is not None:
                undo.callback(_restore, state, (state.options, state.enabled, state.tensors))
                state.options, state.enabled, state.tensors = option.options, True, form.state
            if form.module is not None:
                owner, leaf = self._owner(layer)
                undo.callback(setattr, owner, leaf, self.attention(layer))
                setattr(owner, leaf, form.module)
            parameters = dict(self.attention(layer).named_parameters())
            for name, tensor in form.weights.items():
                undo.callback(setattr, parameters[name], "data", parameters[name].data)
                parameters[name].data = tensor.to(parameters[name].dtype)
            yield

    @contextmanager
    def on(self, choice: Choice) -> Iterator[None]:
        """Inside the block every layer stands in its chosen form."""
        with ExitStack() as stack:
            for layer, option in choice.items():
                stack.enter_context(self.at(layer, option))
            yield

    def _path(self, layer: int) -> str:
        return self.model.module_name(self.model.family.prefix(layer)).rstrip(".")

    def _owner(self, layer: int) -> tuple[nn.Module, str]:
        path, _, leaf = self._path(layer).rpartition(".")
        return self.live.get_submodule(path), leaf


class Meter:
    """Measures choices against the original's predictions, which are kept.

    Args:
        mix: the model, with no choice made.
        samples: what to measure on; the first is running text.
    """

    def __init__(self, mix: Mix, samples: Sequence[Sample]) -> None:
        self.mix, self.samples = mix, list(samples)
        with fast_products(mix.half):
            self.reference = [predictions_on(mix.live, sample) for sample in samples]
        self._known: dict[tuple[tuple[int, str], ...], Measured] = {}

    @property
    def measurements(self) -> int:
        """How many choices have been measured."""
        return len(self._known)

    def measure(self, choice: Choice) -> Measured:
        """What a choice costs; a choice that was measured before is not measured again."""
        key = tuple(sorted((layer, option.name) for layer, option in choice.items() if option.name))
        if key not in self._known:
            with self.mix.on(choice), fast_products(self.mix.half):
                self._known[key] = compared(self.mix.live, self.samples, self.reference)
        return self._known[key]


def predictions_on(live: Any, sample: Sample) -> Predictions:
    """What a model predicts at a sample's scored positions, as rows."""
    device = next(live.parameters()).device
    scored = sample.scored.to(device)
    last = int(len(sample.scored) - int(sample.scored.int().argmax()))
    parts = [predict(live, {"input_ids": rows}, last)[:, scored[-last:]] for rows in sample.batches(device)]
    return Predictions.cat(parts)


def compared(live: Any, samples: Sequence[Sample], reference: Sequence[Predictions]) -> Measured:
    """What a model has lost.

    Args:
        live: the changed model.
        samples: what to measure on.
        reference: the original's predictions on each.
    """
    text, probes, hits, asked = 0.0, [], 0, 0
    for sample, wanted in zip(samples, reference):
        predictions = predictions_on(live, sample)
        gap: Distances = distances(wanted, predictions)
        kl = gap.mean_kl if torch.isfinite(gap.kl).all() else float("inf")
        if sample.answers is None:
            text = kl
            continue
        answers = sample.answers.flatten()
        right = wanted.argmax().cpu() == answers
        probes.append(kl)
        hits += int(((predictions.argmax().cpu() == answers) & right).sum())
        asked += int(right.sum())
    return Measured(text, sum(probes) / max(1, len(probes)), hits / asked if asked >= _FEWEST else None)


def as_many_heads(heads: Heads, kv: int) -> Heads:
    """The same layer with every KV head repeated until there are ``kv``: fewer heads in the old shapes."""
    times = kv // heads.num_kv_heads
    if times == 1:
        return heads
    fields: Mapping[str, Tensor | None] = {
        name: getattr(heads, name) for name in ("k", "v", "k_bias", "v_bias", "k_norm")
    }
    wide = {
        name: tensor.repeat_interleave(times, 0)
        for name, tensor in fields.items()
        if tensor is not None and (name != "k_norm" or tensor.ndim == 2)
    }
    return replace(heads, **wide)  # type: ignore[arg-type]


def _in_old_shapes(named: dict[str, Tensor], parameters: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Weights of fewer KV heads than a module has, each repeated for the query heads that read it.

    Args:
        named: by the parameter's name; ``kv_sizes``, where it is there, says how many query heads read each KV head.
        parameters: of the module.
        size: numbers of a head.
    """
    sizes = named.pop("kv_sizes", None)
    if sizes is None:
        return named
    for name, tensor in named.items():
        if tensor.shape[0] < parameters[name].shape[0]:
            times = sizes * (parameters[name].shape[0] // size) / sizes.sum()
            named[name] = tensor.unflatten(0, (-1, size)).repeat_interleave(times.round().long(), 0).flatten(0, 1)
    return named


def _restore(state: Any, before: tuple[Any, bool, Any]) -> None:
    state.options, state.enabled, state.tensors = before
