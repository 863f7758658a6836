"""Rehead's own model classes, for checkpoints that no class of transformers can express.

A checkpoint contains its modelling file, with the core that the file imports, and names it in ``auto_map``. A program
that imports ``rehead`` can load it without trusting remote code, since the same classes are registered here.
:func:`install` does that when transformers' auto classes are imported, so that importing ``rehead`` alone stays cheap.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from rehead.errors import UnsupportedError, UsageError

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
PREFIX = "modeling_rehead_"
PARALLEL = PREFIX + "parallel"
CORE = PREFIX + "core"
RING = PREFIX + "ring"
CACHE = PREFIX + "cache"
LATENT = PREFIX + "latent"
WINDOW = PREFIX + "window"


def modeling_file(name: str = PARALLEL) -> Path:
    """The path of the modelling file with this module name, which checkpoints carry a copy of."""
    return Path(__file__).with_name(f"{name}.py")


def carried_modules(config: Mapping[str, Any]) -> list[str]:
    """Rehead's modules that a ``config.json`` names in its ``auto_map``, sorted."""
    auto_map = config.get("auto_map")
    named = auto_map.values() if isinstance(auto_map, Mapping) else ()
    modules = {str(path).split(".")[0] for path in named}
    return sorted(modules & {path.stem for path in Path(__file__).parent.glob(f"{PREFIX}*.py")})


def without_remote_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without an ``auto_map`` of foreign code.

    transformers' own class loads the converted checkpoint; remote code does not know the change and is not copied.
    """
    foreign = config.get("auto_map") and not carried_modules(config)
    return {key: value for key, value in config.items() if not (foreign and key == "auto_map")}


def carried_files(config: Mapping[str, Any]) -> dict[str, str]:
    """The text, by file name, of Rehead's modelling files that a ``config.json`` needs."""
    texts: dict[str, str] = {}
    waiting = carried_modules(config)
    while waiting:
        name = waiting.pop()
        texts[f"{name}.py"] = text = modeling_file(name).read_text(encoding="utf-8")
        waiting += [other for other in needed_modules(text) if f"{other}.py" not in texts]
    return dict(sorted(texts.items()))


def needed_modules(text: str) -> list[str]:
    """The modules in its folder that a modelling file imports."""
    return sorted(set(re.findall(rf"^from \.({PREFIX}\w+) import ", text, re.MULTILINE)))


def parallel_families() -> dict[str, str]:
    """Serial model types that have a parallel class here -> the prefix of their classes."""
    return dict(importlib.import_module(f"{__name__}.{PARALLEL}").FAMILIES)


def parallel_config(config: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The ``config.json`` of a model with parallel blocks in some layers, from a serial or parallel one.

    Weights and their names stay the same.

    Args:
        config: the content of ``config.json``, serial or already (partly) parallel.
        layers: all layers that shall be parallel, 0-based.

    Returns:
        A new dictionary; the serial config if ``layers`` is empty.

    Raises:
        UnsupportedError: the model type has no parallel class here.
        UsageError: the model does not have one of the layers.
    """
    file = importlib.import_module(f"{__name__}.{PARALLEL}")
    result = serial_config(config)
    model_type, count = str(result.get("model_type")), int(result.get("num_hidden_layers", 0))
    if model_type not in file.FAMILIES:
        raise UnsupportedError(
            f"model type {model_type!r} has no parallel class; choose one of {', '.join(sorted(file.FAMILIES))}"
        )
    parallel = sorted(set(layers))
    if parallel and not 0 <= parallel[0] <= parallel[-1] < count:
        wrong = parallel[0] if parallel[0] < 0 else parallel[-1]
        raise UsageError(f"layer {wrong} does not exist; the model's layers are 0 to {count - 1}")
    if not parallel:
        return result
    classes = _classes(PARALLEL, f"Parallel{file.FAMILIES[model_type]}")
    return result | {"model_type": file.TYPE_PREFIX + model_type, **classes, "parallel_layers": parallel}


def _classes(module: str, name: str) -> dict[str, Any]:
    """What a ``config.json`` says of the classes that a modelling file has under a name."""
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{name}Config",
            "AutoModel": f"{module}.{name}Model",
            "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
        },
    }


def serial_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same weights in serial blocks, for transformers' own class; a copy of a serial config."""
    file = importlib.import_module(f"{__name__}.{PARALLEL}")
    result, model_type = dict(config), str(config.get("model_type"))
    if not model_type.startswith(file.TYPE_PREFIX):
        return result
    for name in ("auto_map", "parallel_layers"):
        result.pop(name, None)
    model_type = model_type.removeprefix(file.TYPE_PREFIX)
    return result | {"model_type": model_type, "architectures": [f"{file.FAMILIES[model_type]}ForCausalLM"]}


def window_families() -> dict[str, str]:
    """Model types that have a class with windows and sinks here -> the prefix of their classes."""
    return dict(importlib.import_module(f"{__name__}.{WINDOW}").FAMILIES)


def window_config(config: Mapping[str, Any], windows: Sequence[int | None], sinks: int, logits: bool) -> dict[str, Any]:
    """The ``config.json`` of a model with windows of its own in each layer, from one with or without.

    Args:
        config: the content of ``config.json``.
        windows: tokens that each layer sees; None for all.
        sinks: first tokens of a text that stay visible.
        logits: whether each head has a sink logit, a tensor that the plain checkpoint does not have.
    """
    file = importlib.import_module(f"{__name__}.{WINDOW}")
    result, model_type = dict(config), str(config.get("model_type")).removeprefix(file.TYPE_PREFIX)
    for key in ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"):
        result.pop(key, None)
    return result | {
        "model_type": file.TYPE_PREFIX + model_type,
        **_classes(WINDOW, f"Window{file.FAMILIES[model_type]}"),
        "layer_windows": list(windows),
        "sink_tokens": sinks,
        "sink_logits": logits,
    }


def register() -> None:
    """Register the classes of every modelling file here with transformers' auto classes; may be repeated."""
    for path in sorted(Path(__file__).parent.glob(f"{PREFIX}*.py")):
        if path.stem not in (CORE, RING, CACHE, LATENT):
            importlib.import_module(f"{__name__}.{path.stem}").register()


class _AfterImport(MetaPathFinder):
    """An import hook for one module: imports it normally, then calls :func:`register`."""

    def __init__(self) -> None:
        self._busy = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def install() -> None:
    """Register now if transformers' auto classes are imported, otherwise as soon as they are."""
    if AUTO_CONFIG in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
