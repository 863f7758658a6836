"""Every option of every layer, from one calibration pass: its closed form, and what its error will cost.

What it costs is predicted from one backward pass. With y drawn from the model's own predictions and g the gradient of
log p(y) in a layer's attention output, an output that moves by d costs 1/2 E[(g . d)^2] nats, to second order: the
Fisher information as a quadratic form (Martens 2020, arXiv 1412.1193). The numbers g . d of every token are kept, so
that what several layers cost *together* is predicted too, 1/2 E[(sum of g . d over layers)^2]: errors that add up or
cancel are seen, where sums of single losses miss both. The loss itself is measured by :meth:`Meter.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rehead.attention.interface import register
from rehead.console import Progress
from rehead.convert.budget.library import Choice, Library, form_of
from rehead.convert.budget.mix import Mix, Sample
from rehead.data.calibration import CalibrationText
from rehead.errors import UnsupportedError
from rehead.healing.run import observe
from rehead.healing.writers import LeastSquares
from rehead.models.linalg import fast_products
from rehead.models.model import Model
from rehead.models.watch import hooked, until
from rehead.variants.pool.grouping import contiguous_groups
from rehead.variants.stack import live_variant

#: Times that y is drawn for every text.
_DRAWS = 1


@dataclass
class Estimates:
    """What the options of a model's layers lose, as far as one pass can tell.

    Attributes:
        effects: (layer, option's name) -> g . d of every token of all samples, scaled so that half of the sum of their
            squares is the loss.
    """

    effects: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def predicted(self, choice: Choice) -> float:
        """The loss of a choice, to second order."""
        effect = self.effect(choice)
        return 0.0 if effect is None else float(effect.square().sum()) / 2

    def effect(self, choice: Choice) -> Tensor | None:
        """The sum of the effects of a choice's options, [tokens]; None for no change."""
        parts = [self.effects[layer, option.name] for layer, option in choice.items() if option.name]
        return torch.stack(parts).sum(0) if parts else None


@dataclass
class _Seen:
    """One batch of a sample as a layer's attention meets it: its call, output [b, S, n] and gradient."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradients: list[Tensor]
    weight: float


def solve_forms(
    mix: Mix,
    model: Model,
    options: Library,
    text: CalibrationText,
    states: dict[tuple[int, str], dict[str, Tensor]] | None = None,
    progress: Progress | None = None,
) -> Library:
    """Put the closed form of every option into ``mix``, from one pass over the calibration text.

    Args:
        states: of :func:`calibrated_states`.

    Returns:
        The options without those that a layer's weights refuse: a latent where normed keys are far from linear.
    """
    kinds = {option.name: option for layer in options.layers.values() for option in layer if option.variant}
    forms = {name: form_of(model, option.variant, option.options) for name, option in kinds.items()}  # type: ignore[arg-type]
    solved = [form for form in forms.values() if form is not None]
    for layer, layer_options in options.layers.items():
        for option in layer_options:
            if option.variant is not None and forms[option.name] is None:
                mix.add(layer, option, None, None)
                mix.forms[layer, option.name].state = (states or {}).get((layer, option.name), {})
    if not solved:
        return options
    refused: dict[tuple[int, str], str] = {}
    needs = tuple(dict.fromkeys(name for form in solved for name in form.needs))
    groups = math.lcm(*(form.groups for form in solved))
    for seen in observe(model, text, needs, groups, mix.device, progress):
        merged = {
            count: seen.moments.merged(contiguous_groups(groups, count)) for count in {form.groups for form in solved}
        }
        for option in options.layers.get(seen.layer, ()):
            form = forms.get(option.name)
            if form is not None:
                try:
                    changed = form.closed(seen.layer, seen.heads, merged[form.groups])
                except UnsupportedError as error:
                    refused[seen.layer, option.name] = str(error)
                else:
                    mix.add(seen.layer, option, form, changed)
    return options.without(refused)


def calibrated_states(live: Any, options: Library, tokens: Tensor) -> dict[tuple[int, str], dict[str, Tensor]]:
    """The tensors that variants in front of the attention fit to text (a sink logit for each head), each layer's alone.

    Args:
        live: the model, under no variant.
        options: the library.
        tokens: int64 [B, S].

    Returns:
        (layer, option's name) -> the layer's tensors by name.
    """
    register()
    named = {option.name: option for each in options.layers.values() for option in each}
    states: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, option in named.items():
        variant, wanted = option.variant, option.options
        if variant is None or wanted is None or variant.calibrate is None or not variant.needs(wanted):
            continue
        applied = live_variant(live, variant.name, **wanted.model_dump(exclude={"layers"})).apply()
        try:
            applied.calibrate(tokens.to(next(live.parameters()).device), sequential=False)
            for state in applied.states:
                if state.index is not None:
                    kept = {key: tensor.detach().clone() for key, tensor in state.tensors.items()}
                    states[state.index, name] = kept
        finally:
            applied.revert()
    return states


def estimate(
    mix: Mix,
    options: Library,
    fitted: Sample,
    samples: Sequence[Sample],
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimates:
    """Refit the output projection of every option in ``mix``, and estimate what each costs.

    Args:
        mix: with the closed form of every option.
        options: the options.
        fitted: running text for the refit; not what is measured on, of which it would learn the noise.
        samples: texts to estimate on; the first is running text.
        seed: of y.
        progress: called with ("reading", texts done, texts), then ("estimating", layers done, layers).
    """
    estimates = Estimates()
    with fast_products(mix.half):
        seen = _watch(mix, list(options.layers), [fitted, *samples], seed, progress)
    for done, (layer, layer_options) in enumerate(options.layers.items()):
        if progress is not None:
            progress("estimating", done, len(options.layers))
        batches = seen.pop(layer)
        for option in layer_options[1:]:
            with mix.at(layer, option), fast_products(mix.half):
                estimates.effects[layer, option.name] = _effect(mix, layer, option.name, batches)
    return estimates


def _effect(mix: Mix, layer: int, name: str, batches: list[list[_Seen]]) -> Tensor:
    """The effect on every token of a layer that stands in an option, its output projection refitted in passing."""
    output, transposed = mix.output(layer), mix.model.family.transposed
    parameters: Any = output
    problem = LeastSquares([parameters.weight.T if transposed else parameters.weight], parameters.bias)
    inputs: list[list[Tensor]] = []
    for number, sample in enumerate(batches):
        inputs.append([])
        for batch in sample:
            read = _output_input(mix.attention(layer), output, batch)
            inputs[-1].append(read)
            if number == 0:  # the text to fit to
                problem.add([read], batch.output)
    (fitted,), fitted_bias, _ = problem.solve()
    refitted = {"weight": fitted.T.contiguous() if transposed else fitted}
    if fitted_bias is not None:
        refitted["bias"] = fitted_bias
    _store(mix, layer, name, refitted)
    effects = []
    for sample, reads in zip(batches[1:], inputs[1:]):
        for batch, read in zip(sample, reads):
            gap = read @ fitted.T - batch.output
            if fitted_bias is not None:
                gap = gap + fitted_bias
            for gradient in batch.gradients:
                effects.append((gradient * gap).sum(-1).flatten() * batch.weight)
    return torch.cat(effects)


def _output_input(attention: nn.Module, output: nn.Module, batch: _Seen) -> Tensor:
    """What the output projection reads, [b, S, w]."""
    kept: list[Tensor] = []
    with until(output, lambda args, kwargs: kept.append(args[0])):
        attention(*batch.args, **batch.kwargs)
    return kept[0].reshape(*batch.output.shape[:2], -1)


def _store(mix: Mix, layer: int, name: str, refitted: dict[str, Tensor]) -> None:
    """Give a form its refitted output projection."""
    form, stem = mix.forms[layer, name], mix.model.family.names.output
    for part, tensor in refitted.items():
        if form.module is not None:
            form.module.get_submodule(stem)._parameters[part] = nn.Parameter(tensor, requires_grad=False)
        else:
            form.weights[f"{stem}.{part}"] = tensor


def _watch(
    mix: Mix, layers: Sequence[int], samples: Sequence[Sample], seed: int, progress: Progress | None
) -> dict[int, list[list[_Seen]]]:
    """Every layer's attention on every batch of every sample, after the first with the gradients of log p(y)."""
    seen: dict[int, list[list[_Seen]]] = {layer: [[] for _ in samples] for layer in layers}
    trained = [parameter for parameter in mix.live.parameters() if parameter.requires_grad]
    mix.live.requires_grad_(False)
    generator = torch.Generator(device=mix.device).manual_seed(seed)
    try:
        for number, sample in enumerate(samples):
            share = (1 / (sample.count * _DRAWS)) ** 0.5
            if number > 1:  # the probes together count as much as the text
                share *= (1 / (len(samples) - 2)) ** 0.5
            for done, rows in enumerate(batches := list(sample.batches(mix.device))):
                if progress is not None:
                    progress("reading", number + done / len(batches), len(samples))
                with torch.set_grad_enabled(number > 0), ExitStack() as stack:
                    for layer in layers:
                        _watched(stack, mix.attention(layer), share, seen[layer][number])
                    if number == 0:
                        mix.live.base_model(input_ids=rows, use_cache=False)
                        continue
                    stack.enter_context(_from_embeddings(mix.live))
                    logits = mix.live(input_ids=rows, use_cache=False).logits[:, sample.scored.to(mix.device)]
                    _backward(logits.float(), generator)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return seen


def _from_embeddings(live: Any) -> Any:
    """Gradients flow from the embeddings on, whose output is a leaf."""
    embedding = live.get_input_embeddings()
    return hooked(embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_()))


def _watched(stack: ExitStack, attention: nn.Module, weight: float, kept: list[_Seen]) -> None:
    """Keep what an attention module is called with, gives, and the gradients of that."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        kept.append(_Seen(args, kwargs, output.detach(), [], weight))
        if output.requires_grad:
            output.register_hook(kept[-1].gradients.append)

    stack.enter_context(hooked(attention.register_forward_hook(keep, with_kwargs=True)))


def _backward(logits: Tensor, generator: torch.Generator) -> None:
    log_p = logits.log_softmax(-1)
    flat = log_p.detach().exp().flatten(0, -2)
    for draw in range(_DRAWS):
        y = torch.multinomial(flat, 1, generator=generator)
        loss = log_p.flatten(0, -2).gather(-1, y).sum()
        loss.backward(retain_graph=draw + 1 < _DRAWS)
