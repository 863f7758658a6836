"""What every patch of a live model is: something that can be applied, reported on, proved or measured, and undone.

A patch changes one model instance. It never touches a class or a module global, and it leaves through an undo log, so
that a failure half-way and a normal revert take the same road.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from rehead.errors import UsageError, unknown_name

APPLIED = "_rehead_patch"
"""Attribute of a patched model that holds its patch."""


@dataclass
class LayerRecord:
    """One layer of a patched model.

    Attributes:
        name: the module's name in the model.
        module: its class.
        was, now: the attention implementation before and after.
        how: ``"interface"`` or ``"adapter"``.
        calls: times the patched attention ran in eager mode (a compiled graph does not count).
        window: a window that the patch adds to the model's own mask.
        deterministic: ask the GPU backward for bitwise repeatable gradients.
    """

    name: str
    module: str
    was: str
    now: str
    how: str = "interface"
    calls: int = 0
    window: int | None = None
    deterministic: bool = False


@dataclass
class PatchReport:
    """What a patch did, layer by layer."""

    patch: str
    model: str
    applied: bool
    exact: bool
    layers: list[LayerRecord] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = "exact" if self.exact else "approximate"
        state = "applied" if self.applied else "not applied"
        lines = [f"{self.patch} on {self.model}: {state}, {kind}, {len(self.layers)} layers"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines += [
            f"  {layer.name:<{width}}  {layer.module}: {layer.was} -> {layer.now} ({layer.how}), {layer.calls} calls"
            for layer in self.layers
        ]
        if self.untouched:
            lines.append(f"  not attention, left alone: {', '.join(self.untouched)}")
        return "\n".join(lines)


class UndoLog:
    """Actions that take a model back, run last to first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._actions)

    def add(self, action: Callable[[], object]) -> None:
        self._actions.append(action)

    def run(self) -> None:
        while self._actions:
            self._actions.pop()()

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute past ``__setattr__``, and remember how to restore the instance's dictionary."""
        store = target.__dict__
        if name in store:
            before = store[name]
            self.add(lambda: store.__setitem__(name, before))
        else:
            self.add(lambda: store.pop(name, None))
        store[name] = value


class Patch(ABC):
    """Base of all patches. A subclass sets ``name`` and ``summary``, takes a dataclass of options and fills in hooks.

    An exact patch implements :meth:`prove`, an approximate one :meth:`measure`.

    Args:
        model: the live model.
        **options: fields of :attr:`Options`.

    Raises:
        UsageError: not a model, or an option that does not exist.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @dataclass
    class Options:
        """No options."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        assert is_dataclass(self.Options)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"patch_model wants a loaded model, not {type(model).__name__}; call from_pretrained first"
            )
        model = unwrapped(model)
        known = [f.name for f in fields(self.Options)]
        for given in options:
            if given not in known:
                raise UsageError(
                    unknown_name(f"option of patch {self.name!r}", given, known)
                    if known
                    else f"patch {self.name!r} takes no options, not {given!r}; leave it out"
                )
        self.model = model
        self.options = self.Options(**options)
        self._undo = UndoLog()
        self._records: list[LayerRecord] = []
        self._untouched: list[str] = []

    @property
    def applied(self) -> bool:
        """Whether this patch is in place now."""
        return self.model.__dict__.get(APPLIED) is self

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the patched model computes the same function."""

    @abstractmethod
    def _check(self) -> None:
        """Raise for a model that cannot be patched; changes nothing."""

    @abstractmethod
    def _apply(self, undo: UndoLog) -> None:
        """Change the model, logging every change in ``undo`` before or as it is made."""

    def apply(self) -> Patch:
        """Patch the model. If anything fails, the model is left as it was.

        Raises:
            UsageError: a patch is already applied to this model.
            UnsupportedError: the model cannot be patched.
        """
        for name, module in self.model.named_modules():
            if APPLIED in module.__dict__:
                other = module.__dict__[APPLIED]
                if other.model is not module:
                    raise UsageError(
                        f"{name or 'this model'} is a copy of one under patch {other.name!r} and keeps that patch; "
                        "copy the model before patching it"
                    )
                raise UsageError(
                    f"patch {other.name!r} is already applied to {name or 'this model'}; call its revert() first"
                )
        self._check()
        try:
            self._apply(self._undo)
            self._undo.set_attribute(self.model, APPLIED, self)
        except BaseException:
            self._undo.run()
            self._records = []
            raise
        return self

    def revert(self) -> None:
        """Take the model back to what it was, bit for bit.

        Raises:
            UsageError: the patch is not applied.
        """
        if not self.applied:
            raise UsageError(f"patch {self.name!r} is not applied; nothing to revert")
        self._undo.run()

    def __enter__(self) -> Patch:
        if not self.applied:
            self.apply()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.applied:
            self.revert()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of a patched model works, but its undo log would restore the original's modules, so it gets none.
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone._undo = UndoLog()
        memo[id(self)] = clone
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            f"a model under patch {self.name!r} cannot be pickled (torch.save of a whole model, a new process); "
            "call revert() first, or save with save_pretrained or state_dict()"
        )

    def report(self) -> PatchReport:
        """Per layer: what it was, what it is, and how often it was called."""
        return PatchReport(
            patch=self.name,
            model=type(self.model).__name__,
            applied=self.applied,
            exact=self.exact,
            layers=[copy.copy(record) for record in self._records],
            untouched=list(self._untouched),
        )

    def prove(self, **options: Any) -> Any:
        """Show that the patched model computes the same function, or raise; exact patches implement this."""
        raise UsageError(
            f"patch {self.name!r} with these options is not exact; call measure() to see how far off it is"
        )

    def measure(self, **options: Any) -> Any:
        """Show how far the patched model is from the original; approximate patches implement this."""
        raise UsageError(f"patch {self.name!r} with these options is exact; call prove()")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel``, which share its modules."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


PatchType = TypeVar("PatchType", bound=type[Patch])

PATCHES: dict[str, type[Patch]] = {}


def register_patch(cls: PatchType) -> PatchType:
    """Class decorator: make a patch available to :func:`patch_model` under its ``name``.

    Raises:
        ValueError: the name is taken.
    """
    if cls.name in PATCHES:
        raise ValueError(f"patch {cls.name!r} is already registered by {PATCHES[cls.name].__qualname__}")
    PATCHES[cls.name] = cls
    return cls


def patch_model(model: nn.Module, name: str, **options: Any) -> Patch:
    """Prepare a patch of a live model; it is applied on entering the context or by :meth:`Patch.apply`.

    ::

        with patch_model(model, "tiled") as patch:
            print(patch.report())
            patch.prove()

    Args:
        model: a transformers model, possibly wrapped by PEFT; of one wrapped by ``torch.compile`` or
            ``DistributedDataParallel``, the model inside is patched.
        name: a registered patch.
        **options: the patch's options.

    Raises:
        UsageError: no such patch or option (the nearest name is suggested), or not a model.
    """
    if name not in PATCHES:
        raise UsageError(unknown_name("patch", name, PATCHES))
    return PATCHES[name](model, **options)


def own_configs(model: nn.Module, undo: UndoLog) -> dict[int, Any]:
    """Give every module of ``model`` its own copy of the configs it holds, since transformers shares config objects.

    Sub-configs keep their relation to their parents. Returns the copies by the id of the original.
    """
    memo: dict[int, Any] = {}
    copies: dict[int, Any] = {}
    originals: list[Any] = []  # keeps ids valid while they serve as keys
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                if id(value) not in copies:
                    originals.append(value)
                    copies[id(value)] = copy.deepcopy(value, memo)
                undo.set_attribute(module, name, copies[id(value)])
    return copies
