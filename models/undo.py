"""Undo every change of a live model, and give modules configs of their own that a change may edit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from rehead.errors import UsageError


class UndoLog:
    """Actions that undo the changes of a model, run last to first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
        self._guards: list[Callable[[], Callable[[], object] | None]] = []

    def __len__(self) -> int:
        return len(self._actions)

    def add(self, action: Callable[[], object]) -> None:
        """Run ``action`` when the changes are undone."""
        self._actions.append(action)

    def guard(self, check: Callable[[], Callable[[], object] | None]) -> None:
        """Run ``check`` before anything is undone: it may raise to refuse, and return an action to run last."""
        self._guards.append(check)

    def run(self) -> None:
        """Undo everything; if a guard raises, nothing has changed."""
        after = [check() for check in self._guards]
        self._guards.clear()
        while self._actions:
            self._actions.pop()()
        for action in after:
            if action is not None:
                action()

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute without ``__setattr__``, and remember how to restore it."""
        self.set_item(target.__dict__, name, value)

    def set_item(self, store: dict[str, Any], name: str, value: object) -> None:
        """Set an entry of a dictionary that a model holds, and remember how to restore it."""
        if name in store:
            before = store[name]
            self.add(lambda: store.__setitem__(name, before))
        else:
            self.add(lambda: store.pop(name, None))
        store[name] = value


class Undoing:
    """What changes a live model and can undo it; a copy of the model keeps the change but not the way back."""

    _undo: UndoLog
    name: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # An empty undo log: this one would change the original's modules.
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(self.__dict__, _undo=UndoLog())
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        patch = f"patch {self.name!r}" if self.name else "a patch"
        raise UsageError(
            f"a model under {patch} cannot be pickled (torch.save of a whole model, a new process); "
            "call revert() first, or save with save_pretrained or state_dict()"
        )


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
