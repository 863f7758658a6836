"""How long work will take and how much memory it needs, tried out on a model's first layers with random weights.

A model of the real width and a few layers does the real work on one batch; what the other layers add is taken from
there. No weight is read, so an estimate of a large model takes seconds, and it holds for the machine it is made on.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rehead.checkpoints.copying import give_back_memory
from rehead.checkpoints.source import Source
from rehead.console import duration, quiet_transformers
from rehead.errors import UnsupportedError, first_line
from rehead.models.config import causal_lm_class, resolve_config
from rehead.models.live import clock
from rehead.models.tiny import LISTS

#: Layers of the model that is tried out, beside one with a single layer.
_LAYERS = 4
#: Numbers of a layer from which on one layer more has to do.
_LARGE = 200_000_000
#: Bytes read from disk and converted in a second, of a checkpoint that is not in memory yet: a cautious figure.
_READ = 500e6
_OPEN = 2.0


@dataclass
class Estimate:
    """What a run is expected to need.

    Attributes:
        seconds: by stage, in the order in which they come.
        memory_bytes: at most at once: resident on a CPU, allocated on a GPU.
        disk_bytes: that it writes.
        facts: what would be done, by name, for people.
        notes: what the estimate leaves out.
    """

    seconds: dict[str, float]
    memory_bytes: float
    disk_bytes: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"dry_run": True, "total_seconds": sum(self.seconds.values()), **vars(self)}

    def rows(self) -> list[tuple[str, str]]:
        """For a terminal."""
        stages = ", ".join(f"{name} {duration(each)}" for name, each in self.seconds.items())
        rows = list(self.facts.items())
        rows.append(("time", f"about {duration(sum(self.seconds.values()))} ({stages})"))
        rows.append(("memory", f"about {self.memory_bytes / 1e9:.2g} GB"))
        rows += [("disk", f"about {self.disk_bytes / 1e9:.2g} GB")] if self.disk_bytes else []
        return [*rows, *(("not counted", note) for note in self.notes)]


@dataclass(frozen=True)
class Sketch:
    """A model that is not loaded.

    Attributes:
        name: as the user wrote it.
        config: transformers' config.
        layers: of its decoder.
        parameters: numbers in the checkpoint.
        stored_bytes: of its tensors.
    """

    name: str
    config: Any
    layers: int
    parameters: int
    stored_bytes: int

    @classmethod
    def of(cls, name: str, source: Source) -> Sketch:
        """From an open checkpoint; reads headers only.

        Raises:
            UnsupportedError: its class cannot be built.
        """
        config = resolve_config(source.config, name)
        layers = int(config.get_text_config(decoder=True).num_hidden_layers)
        numbers = sum(math.prod(info.shape) for info in source.tensors.values())
        return cls(name, config, layers, numbers, sum(info.nbytes for info in source.tensors.values()))

    def first_layers(self, count: int, dtype: torch.dtype, device: torch.device) -> Any:
        """A live model of the real width with fewer layers and random weights.

        Raises:
            UnsupportedError: the class does not take fewer layers.
        """
        config = copy.deepcopy(self.config)
        inner = config.get_text_config(decoder=True)
        for key in LISTS:
            kinds = getattr(inner, key, None)
            if isinstance(kinds, (list, tuple)) and len(kinds) == self.layers:
                setattr(inner, key, type(kinds)(kinds[:count]))
        inner.num_hidden_layers = count
        try:
            with quiet_transformers(), torch.device(device):
                return causal_lm_class(config)._from_config(config, dtype=dtype).eval()
        except Exception as error:
            raise UnsupportedError(
                f"{self.name}: cannot be estimated, its class takes no {count} layers ({first_line(error)}); "
                "run it without --dry-run on fewer tokens"
            ) from None

    @property
    def tried(self) -> int:
        """Layers to try out: enough to tell them from all that comes once."""
        large = self.parameters / max(self.layers, 1) > _LARGE
        return min(2 if large else _LAYERS, self.layers)

    def load_seconds(self) -> float:
        """Of loading it."""
        return _OPEN + self.stored_bytes / _READ


@dataclass(frozen=True)
class Cost:
    """What work on a batch takes: ``once`` whatever the number of layers, and for each ``layer``."""

    once: float
    layer: float

    def of(self, layers: int) -> float:
        """For a model of so many layers."""
        return self.once + layers * self.layer

    @classmethod
    def fitted(cls, found: Mapping[int, float]) -> Cost:
        """From figures at two numbers of layers, or at one alone."""
        (few, less), (many, more) = min(found.items()), max(found.items())
        layer = max(more - less, 0.0) / (many - few) if many > few else more / max(many, 1)
        return cls(max(less - few * layer, 0.0), layer)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median seconds of some work after one run to warm up; one run where it takes long.

    On a CPU what takes seconds needs no warming up: its first run counts.
    """
    seconds: list[float] = []
    for repeat in range(repeats + 1):
        start = clock(device)
        work()
        last = clock(device) - start
        if repeat or (last > 3 and device.type == "cpu"):
            seconds.append(last)
        if sum(seconds) > 10:
            break
    return statistics.median(seconds)


def memory_of(work: Callable[[], Any], device: torch.device) -> float:
    """Most bytes that some work takes beyond what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = float(torch.cuda.memory_allocated(device))
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        give_back_memory()  # so that what is taken next shows
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        work()
        return max(_resident("VmHWM") - before, 0.0)
    except OSError:
        work()
        return 0.0


def resident(device: torch.device) -> float:
    """Bytes that this process has before any model is in it; 0 on a GPU, where only models are."""
    try:
        give_back_memory()
        return 0.0 if device.type == "cuda" else _resident("VmRSS")
    except OSError:
        return 0.5e9


def _resident(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1024
    raise OSError(key)
