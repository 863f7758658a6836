"""Variants on a live model: put on, one after another, switched layer by layer, and taken off in any order.

What a variant does to attention is a function in front of the attention below it, and can be taken out of the middle of
a stack. What it does to a model's wiring (``redirect``) may rest on what is below it, so it is lifted while something
below is taken off, and put back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from rehead.attention.install import Installation, installation
from rehead.attention.interface import NAME
from rehead.attention.layer import Attend, AttentionLayer
from rehead.errors import UnsupportedError, UsageError
from rehead.models.live import LayerState
from rehead.models.undo import Undoing, UndoLog
from rehead.variants.contract import ALL, VARIANTS, Variant, VariantOptions
from rehead.variants.layer_choice import check_known, named_layers
from rehead.variants.shapes import layouts

STACK = "_rehead_stack"
"""Attribute of a model that holds the variants applied to it, in order."""


def stack_of(model: nn.Module) -> list[LiveVariant]:
    """The variants applied to a model, in the order in which they were."""
    return model.__dict__.get(STACK, [])


class LiveVariant(Undoing):
    """One variant on one live model; nothing is changed before :meth:`apply`.

    Args:
        model: a live model.
        variant: what is done to it.
        options: of the variant; its ``layers`` are named, not ``auto``.

    Attributes:
        name: the variant's.
        states: what is being done, layer by layer; as of the last time where it is not applied.
        untouched: names of attention modules or blocks that are left alone.
    """

    def __init__(self, model: nn.Module, variant: Variant, options: VariantOptions) -> None:
        self.model, self.variant, self.options, self.name = model, variant, options, variant.name
        self.states: list[LayerState] = []
        self.untouched: list[str] = []
        self._undo = UndoLog()
        self._memory: dict[str, Any] = {}
        self._suspended = False

    @property
    def applied(self) -> bool:
        """Whether the model computes with it now."""
        return self in stack_of(self.model) and not self._suspended

    @property
    def exact(self) -> bool:
        """Whether it leaves the model's function as it is: always, or since there was nothing to change."""
        return self.variant.exact(self.options) or (self.applied and not self.states)

    def apply(self) -> LiveVariant:
        """Change the model. If anything fails, it is left as it was.

        Raises:
            UsageError: the variant is applied already, or does nothing here.
            UnsupportedError: the model cannot be changed this way.
        """
        _check_free(self.model, self.name)
        if self.variant.attend is None and self.variant.redirect is None:
            raise UnsupportedError(f"variant {self.name!r} changes checkpoints only; use `rehead convert`")
        # What settles the form of what is below it (fused matrices) stays on top.
        wired = self.variant.redirect is not None and not self.variant.settles
        lifted = [live for live in stack_of(self.model) if wired and live.variant.settles]
        _lift(lifted)
        try:
            self._put_on(len(stack_of(self.model)))
        finally:
            for live in lifted:
                live._put_on(len(stack_of(self.model)))
        for state in self.states:
            state.calls, state.enabled = 0, True
        return self

    def calibrate(self, tokens: Tensor | None, *, sequential: bool = True) -> None:
        """Fit what the variant has of its own in each layer to text, where its options ask for it; once.

        Args:
            tokens: int ``[B, S]``.
            sequential: each layer reads what the changed layers before it give.

        Raises:
            UsageError: there is no text, or it is too short.
        """
        needed = self.variant.calibrate is not None and self.variant.needs(self.options)
        if not needed or self._memory.get("calibrated"):
            return
        if tokens is None:
            raise UsageError(f"{self.name}: is fitted to text; give calibration=, token ids [sequences, length]")
        assert self.variant.calibrate is not None
        self.variant.calibrate(self, tokens, sequential)
        self._memory["calibrated"] = True

    def revert(self) -> None:
        """Take the model back to what it would be without this variant; others stay.

        Raises:
            UsageError: it is not applied.
            UnsupportedError: what was trained meanwhile has no place in the model.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; nothing to revert")
        lifted = _above(self) if self.variant.redirect is not None else []
        places = _lift(lifted)
        gone = 0
        try:
            self._take_off()
            gone = 1
        finally:
            for live in lifted:
                live._put_on(places[live] - gone)

    @contextmanager
    def only(self, layers: Iterable[int]) -> Iterator[None]:
        """Inside the block the variant works in the layers of these indices alone; afterwards as before."""
        wanted = set(layers)
        fixed = [live for live in _above(self) if live.variant.settles and self.variant.redirect is not None]
        with without(fixed) if fixed else ExitStack():
            before = [(state, state.enabled) for state in self.states]
            try:
                for state in self.states:
                    state.enabled = state.index in wanted
                yield
            finally:
                for state, enabled in before:
                    state.enabled = enabled

    @contextmanager
    def computing(self, attend: Attend) -> Iterator[None]:
        """Inside the block the variant's layers compute ``attend`` in place of its own function, to be fitted."""
        shared = installation(self.model)
        assert shared is not None
        before = [(layer.variants, list(layer.variants)) for layer in shared.layers]
        try:
            for pairs, _ in before:
                pairs[:] = [(attend if state in self.states else own, state) for own, state in pairs]
            yield
        finally:
            for pairs, own in before:
                pairs[:] = own

    def _put_on(self, place: int) -> None:
        """Change the model and take the given place in its stack."""
        before = {state.name: state for state in self.states}
        self._memory.pop("temporary", None)
        try:
            if self.variant.redirect is not None:
                asked = None if self.options.layers == ALL else set(named_layers(self.options.layers))
                self.states = self.variant.redirect(self.model, self.options, asked, self._undo, self._memory)
                self.untouched = self._memory.get("untouched", [])
                for state in self.states:
                    if (earlier := before.get(state.name)) is not None:
                        state.calls, state.enabled = earlier.calls, earlier.enabled
            else:
                self.states = self._attend(before)
        except BaseException:
            self._undo.run()
            raise
        self.model.__dict__.setdefault(STACK, []).insert(place, self)

    def _take_off(self, *, temporary: bool = False) -> None:
        self._memory["temporary"] = temporary
        self._undo.run()
        stack = stack_of(self.model)
        stack.remove(self)
        if not stack:
            self.model.__dict__.pop(STACK)

    def _attend(self, before: dict[str, LayerState]) -> list[LayerState]:
        """Put the variant's function in front of the attention of the chosen layers."""
        attend = self.variant.attend
        assert attend is not None
        shared = installation(self.model) or Installation(self.model)
        layers = _chosen(shared.layers, self.options.layers)
        self.untouched = [*shared.towers, *(layer.name for layer in shared.layers if layer not in layers)]
        shared.enter()
        self._undo.add(shared.leave)
        made = layouts(self.model, layers) if self.variant.state is not None and not before else {}
        states = []
        for layer in layers:
            now = NAME if self.name == "tiled" else self.name
            state = before.get(layer.name) or LayerState(
                layer.name, layer.index, layer.module, layer.was, now, layer.how, options=self.options
            )
            if layer.name in made and self.variant.state is not None:
                tensors = self.variant.state(made[layer.name], self.options)
                # Attention whose products are fused has no parameters left.
                weights = chain(self.model.get_submodule(layer.name).parameters(), self.model.parameters())
                device = next(weights).device
                state.tensors = {name: nn.Parameter(tensor.to(device)) for name, tensor in tensors.items()}
            # Parameters of the attention module, for optimizers, moves and copies to find.
            parameters = self.model.get_submodule(layer.name)._parameters
            for name, tensor in state.tensors.items():
                self._undo.set_item(parameters, f"rehead_{self.name}_{name}", tensor)
            layer.variants.append((attend, state))
            self._undo.add(functools.partial(_remove, layer, state))
            states.append(state)
        if self.variant.cache is not None:
            self.states = states
            self.variant.cache(self, self._undo)
        return states


def live_variant(model: nn.Module, name: str, **options: Any) -> LiveVariant:
    """A registered variant for a live model, not applied yet.

    Raises:
        UsageError: no such variant or option.
    """
    variant = VARIANTS.get(name)
    return LiveVariant(unwrapped(model), variant, variant.options.parse(options, f"patch {name!r}"))


def _remove(layer: AttentionLayer, state: LayerState) -> None:
    layer.variants[:] = [pair for pair in layer.variants if pair[1] is not state]


def _check_free(model: nn.Module, name: str) -> None:
    """Refuse a copy of a changed model, a part of one, and a variant that is there already."""
    for path, module in model.named_modules():
        for other in module.__dict__.get(STACK, ()):
            if other.model is not module:
                raise UsageError(
                    f"{path or 'this model'} is a copy of one under patch {other.name!r} and keeps that patch; "
                    "copy the model before patching it"
                )
            if other.name == name or path:
                raise UsageError(
                    f"patch {other.name!r} is already applied to {path or 'this model'}; call its revert() first"
                )


def _chosen(layers: list[AttentionLayer], asked: str | tuple[int, ...]) -> list[AttentionLayer]:
    if asked == ALL:
        return list(layers)
    known = sorted({layer.index for layer in layers if layer.index is not None})
    wanted = set(named_layers(asked))
    check_known(wanted, known)
    return [layer for layer in layers if layer.index in wanted]


def _above(live: LiveVariant) -> list[LiveVariant]:
    """What was applied after a variant and changes the model's wiring."""
    stack = stack_of(live.model)
    return [other for other in stack[stack.index(live) + 1 :] if other.variant.redirect is not None]


def _lift(lives: Sequence[LiveVariant], *, temporary: bool = False) -> dict[LiveVariant, int]:
    """Take variants off, last first; if one refuses, those above it are put back. Returns their places."""
    places = {live: stack_of(live.model).index(live) for live in lives}
    lifted: list[LiveVariant] = []
    try:
        for live in reversed(lives):
            live._take_off(temporary=temporary)
            lifted.append(live)
    except BaseException:
        for live in reversed(lifted):
            live._put_on(places[live])
        raise
    return places


@contextmanager
def without(lives: Sequence[LiveVariant]) -> Iterator[None]:
    """Inside the block the model is what it would be without some of its variants; the others stay.

    Raises:
        UsageError: weights that exist only while a variant is applied were changed.
    """
    model = lives[0].model
    stack = list(stack_of(model))
    wired = [live for live in lives if live.variant.redirect is not None]
    first = min((stack.index(live) for live in wired), default=len(stack))
    lifted = [live for live in stack[first:] if live.variant.redirect is not None]
    others = [live for live in lifted if live not in wired]
    places = _lift(lifted, temporary=True)
    try:
        for live in others:
            live._put_on(len(stack_of(model)))
        with ExitStack() as back:
            back.enter_context(_switched_off([live for live in lives if live.variant.attend is not None]))
            yield
    finally:
        _lift([live for live in others if live in stack_of(model)], temporary=True)
        for live in lifted:
            live._put_on(places[live])


@contextmanager
def _switched_off(lives: list[LiveVariant]) -> Iterator[None]:
    """Inside the block some variants are out of attention, and so is the tiled attention if none is left in it."""
    if not lives:
        yield
        return
    model = lives[0].model
    shared = installation(model)
    assert shared is not None
    others = (live for live in stack_of(model) if live.variant.attend is not None and live not in lives)
    left = any(state.enabled for live in others for state in live.states)
    before = [(state, state.enabled) for live in lives for state in live.states]
    for state, _ in before:
        state.enabled = False
    for live in lives:
        live._suspended = True
    try:
        with ExitStack() if left else shared.removed():
            yield
    finally:
        for state, enabled in before:
            state.enabled = enabled
        for live in lives:
            live._suspended = False


@contextmanager
def off(lives: Iterable[LiveVariant]) -> Iterator[None]:
    """Inside the block the variants are applied and switched off in every layer."""
    with ExitStack() as stack:
        for live in lives:
            stack.enter_context(live.only(()))
        yield


@contextmanager
def ablated(lives: Iterable[LiveVariant]) -> Iterator[bool]:
    """Inside the block applied variants work without what they add; gives whether any of them adds something."""
    changed = []
    for live in lives:
        less = live.variant.ablated(live.options) if live.variant.attend is not None else None
        if less is not None:
            changed += [(state, state.options, less) for state in live.states]
    try:
        for state, _, less in changed:
            state.options = less
        yield bool(changed)
    finally:
        for state, options, _ in changed:
            state.options = options


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel``, which share its modules."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
