"""The way back from every change of a live model, and configs that a change may have to itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class UndoLog:
    """Actions that take a model back, run last to first."""

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []
        self._guards: list[Callable[[], Callable[[], object] | None]] = []

    def __len__(self) -> int:
        return len(self._actions)

    def add(self, action: Callable[[], object]) -> None:
        """Run ``action`` on the way back."""
        self._actions.append(action)

    def guard(self, check: Callable[[], Callable[[], object] | None]) -> None:
        """Run ``check`` before anything is undone: it may raise, and return what is to be done after the rest."""
        self._guards.append(check)

    def run(self) -> None:
        """Take everything back; if a guard raises, nothing has changed."""
        after = [check() for check in self._guards]
        self._guards.clear()
        while self._actions:
            self._actions.pop()()
        for action in after:
            if action is not None:
                action()

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute past ``__setattr__``, and remember how to restore the instance's dictionary."""
        self.set_item(target.__dict__, name, value)

    def set_item(self, store: dict[str, Any], name: str, value: object) -> None:
        """Set an entry of a dictionary that a model holds, and remember how to restore it."""
        if name in store:
            before = store[name]
            self.add(lambda: store.__setitem__(name, before))
        else:
            self.add(lambda: store.pop(name, None))
        store[name] = value


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
