"""Files of finished layers, one each: a resumed run need not compute them again, and the output is read from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from rehead.checkpoints.files import whole
from rehead.errors import first_line


class FinishedLayers:
    """The changed layers of one conversion.

    Args:
        folder: the folder of their files.

    Attributes:
        facts: manifest entries of each layer that was saved or loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[int, dict[str, Any]] = {}

    def __call__(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors by the checkpoint's names."""
        tensors = self.load(layer)
        assert tensors is not None, f"layer {layer} was calibrated but its file is gone"
        return tensors

    def save(self, layer: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a finished layer so that a kill leaves either all of it or nothing."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with whole(self._path(layer)) as part:
            try:
                save_file(
                    {name: t.cpu().contiguous() for name, t in tensors.items()}, part, {"facts": json.dumps(facts)}
                )
            except SafetensorError as error:  # wraps what the system says
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else 0, first_line(error)) from None
        self.facts[layer] = facts

    def load(self, layer: int) -> dict[str, Tensor] | None:
        """A layer's tensors; None where it is not finished."""
        from safetensors import SafetensorError, safe_open

        path = self._path(layer)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as f:
                self.facts[layer] = json.loads((f.metadata() or {})["facts"])
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError):
            return None

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
