"""A patch of a live model: a variant that can be applied, reported on, proved or measured, and undone bit for bit.

A patch changes one model instance, never a class or a module global. Several can be applied to one model, in any order,
and reverted in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.live import LayerState
from rehead.patches import measure as measuring
from rehead.patches import prove as proof
from rehead.patches.report import PatchReport, records
from rehead.variants.contract import AUTO, VARIANTS
from rehead.variants.ranking import choose_layers
from rehead.variants.stack import LiveVariant, live_variant, unwrapped


class Patch:
    """A variant, and those that its options ask for besides, on one live model.

    An exact patch is shown to be so by :meth:`prove`, an approximate one is measured by :meth:`measure`.

    Args:
        model: the live model.
        name: of a registered variant.
        calibration: int ``[B, S]`` token ids that reports, and ``layers="auto"``, measure on. Without them random
            tokens, which say little.
        kl_budget: for ``layers="auto"``: most nats per token that the changed model may be off by.
        **options: of the variant.

    Raises:
        UsageError: not a model, or an unknown variant or option.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        calibration: Tensor | None = None,
        kl_budget: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"patch_model wants a loaded model, not {type(model).__name__}; call from_pretrained first"
            )
        if not isinstance(name, str):
            raise UsageError(f"patch_model wants the name of a variant, not {name!r}; choose one of {live_names()}")
        self.model = unwrapped(model)
        first = live_variant(self.model, name, **options)
        self.name, self.variant, self.options = name, first.variant, first.options
        self.parts = self._parts(first)
        if (self.options.layers == AUTO) != (kl_budget is not None):
            raise UsageError("layers='auto' and kl_budget= go together; give both or neither")
        if calibration is not None:
            probing.checked_tokens(calibration, self.model)
        self.calibration, self.kl_budget = calibration, kl_budget
        self._measured: measuring.Measure | None = None
        self._measured_on = ""

    def _parts(self, first: LiveVariant) -> list[LiveVariant]:
        also = first.variant.also(first.options)
        return [first, *(live_variant(self.model, name, **options) for name, options in also)]

    @property
    def applied(self) -> bool:
        """Whether this patch is in place now."""
        return all(part.applied for part in self.parts)

    @property
    def exact(self) -> bool:
        """Whether the patched model computes the same function; where that depends on the model, once applied."""
        return all(part.exact for part in self.parts)

    @property
    def states(self) -> list[LayerState]:
        """What is being done to each layer, in the order in which it was done."""
        return [state for part in self.parts for state in part.states]

    @property
    def layers(self) -> list[int]:
        """Indices of the layers that the patch changes."""
        return sorted({state.index for state in self.states if state.index is not None})

    def apply(self) -> Patch:
        """Patch the model. If anything fails, the model is left as it was.

        Raises:
            UsageError: this variant is already applied to the model, or no layer can be chosen.
            UnsupportedError: the model cannot be patched.
        """
        if self.options.layers == AUTO:
            self._choose()
        with ExitStack() as undo:
            for part in self.parts:
                part.apply()
                undo.callback(part.revert)
                part.calibrate(self.calibration)
            undo.pop_all()
        return self

    def _choose(self) -> None:
        """Name the layers that lose least within the budget."""
        if self.calibration is None:
            raise UsageError("layers='auto' measures on text: give calibration=, token ids [sequences, length]")
        every = live_variant(self.model, self.name, **{**dict(self.options), "layers": "all"})
        choice = choose_layers(every, self.calibration, kl_budget=self.kl_budget)
        if not choice.layers:
            raise UsageError(
                f"{self.name}: no layer can change within kl_budget={self.kl_budget}; the best alone costs "
                f"{choice.alone[0].kl:.4f}; give more"
            )
        named = {**dict(self.options), "layers": choice.layers}
        self.parts = self._parts(live_variant(self.model, self.name, **named))
        self.options = self.parts[0].options

    def revert(self) -> None:
        """Take the model back to what it would be without this patch, bit for bit; other patches stay.

        Raises:
            UsageError: the patch is not applied.
            UnsupportedError: weights trained while fused cannot be split again; the model is not changed.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; nothing to revert")
        for part in reversed(self.parts):
            part.revert()

    def __enter__(self) -> Patch:
        if not self.applied:
            self.apply()
        return self

    def __exit__(self, *exc: object) -> None:
        for part in reversed(self.parts):
            if part.applied:
                part.revert()

    def only(self, layers: Iterable[int]) -> AbstractContextManager[Any]:
        """Inside the block the patch works in the layers of these indices alone; afterwards as before.

        Raises:
            UsageError: it changes nothing in one of them.
        """
        wanted, stack = list(layers), ExitStack()
        known = sorted({state.index for part in self.parts for state in part.states if state.index is not None})
        if wrong := sorted(set(wanted) - set(known)):
            changed = f"choose from {', '.join(map(str, known))}" if known else "apply it first"
            raise UsageError(f"patch {self.name!r}: changes nothing in layer {wrong[0]}; {changed}")
        for part in self.parts:
            if not part.variant.settles:
                stack.enter_context(part.only(wanted))
        return stack

    def report(self, input_ids: Tensor | None = None) -> PatchReport:
        """Layer by layer: what it was, what it is, how often it was called, and how far off it is.

        A patch of blocks that is applied and approximate is measured the first time; any other where tokens are given.

        Args:
            input_ids: int ``[B, S]`` to measure on; the patch's ``calibration`` otherwise.
        """
        due = self._measured is None and self.variant.redirect is not None
        if self.applied and not self.exact and (due or input_ids is not None):
            self.measure(input_ids=input_ids)
        return PatchReport(
            patch=self.name,
            model=type(self.model).__name__,
            applied=self.applied,
            exact=self.exact,
            layers=records(self.states, self._measured),
            untouched=list(dict.fromkeys(self.parts[0].untouched)),
            measured=self._measured,
            on=self._measured_on,
        )

    def prove(self, **options: Any) -> proof.Proof:
        """Show that the patched model computes the same function, or raise; see :func:`rehead.patches.prove.prove`.

        Of a patch whose first part is approximate and whose last is exact (fused blocks of another form), the exact
        part is proved.

        Raises:
            VerificationError: it does not.
            UsageError: the patch is not applied, or its options make it approximate.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; prove it inside `with patch_model(...)`")
        parts = list(self.parts)
        while parts and not all(part.exact for part in parts):
            parts.pop(0)
        if not parts:
            raise UsageError(
                f"patch {self.name!r} with these options is not exact; call measure() to see how far off it is"
            )
        return proof.prove(parts, **options)

    def measure(
        self, *, input_ids: Tensor | None = None, length: int | None = None, distances: Sequence[int] | None = None
    ) -> measuring.Measure:
        """How far the patched model is from the one without the patch; kept for :meth:`report`.

        Args:
            input_ids: int ``[B, S]``; by default the patch's ``calibration``, or random tokens, which say little.
            length: tokens a row of the random ones.
            distances: tokens back at which copying and key-value recall are tried, beside the original.

        Raises:
            UsageError: the patch is not applied, is exact, or the tokens reach nothing that it changes.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; measure it inside `with patch_model(...)`")
        if self.exact:
            raise UsageError(f"patch {self.name!r} with these options is exact; call prove()")
        tokens = self.calibration if input_ids is None else input_ids
        self._measured = measuring.measure(self.parts, input_ids=tokens, length=length, distances=distances)
        self._measured_on = "random tokens" if tokens is None else "the tokens given"
        return self._measured


def patch_model(model: nn.Module, name: str, **options: Any) -> Patch:
    """Prepare a patch of a live model; it is applied on entering the context or by :meth:`Patch.apply`.

    ::

        with patch_model(model, "tiled") as patch:
            print(patch.report())
            patch.prove()

    Args:
        model: a transformers model, possibly wrapped by PEFT; of one wrapped by ``torch.compile`` or
            ``DistributedDataParallel``, the model inside is patched.
        name: a registered variant.
        **options: see :class:`Patch`.

    Raises:
        UsageError: no such variant or option (the nearest name is suggested), or not a model.
    """
    return Patch(model, name, **options)


def live_names() -> list[str]:
    """Names of the variants that a live model can be patched with."""
    names = VARIANTS.names()
    return [name for name in names if (v := VARIANTS.get(name)).attend is not None or v.redirect is not None]
