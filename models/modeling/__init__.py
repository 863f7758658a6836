"""Model classes of ours, for checkpoints that no class of transformers can express.

A checkpoint carries its modelling file, with the core that it is made with, and names it in ``auto_map``; whoever
imports ``rehead`` can load it without trusting remote code, since the same classes are registered here.
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


def modeling_file(name: str = PARALLEL) -> Path:
    """The file that a checkpoint carries, by its module name."""
    return Path(__file__).with_name(f"{name}.py")


def carried_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules of ours that a ``config.json`` names in its ``auto_map``, sorted."""
    auto_map = config.get("auto_map")
    named = auto_map.values() if isinstance(auto_map, Mapping) else ()
    modules = {str(path).split(".")[0] for path in named}
    return sorted(modules & {path.stem for path in Path(__file__).parent.glob(f"{PREFIX}*.py")})


def without_remote_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without an ``auto_map`` of somebody's code.

    Transformers' own class loads what is converted; remote code neither knows of the change nor comes along.
    """
    foreign = config.get("auto_map") and not carried_modules(config)
    return {key: value for key, value in config.items() if not (foreign and key == "auto_map")}


def carried_files(config: Mapping[str, Any]) -> dict[str, str]:
    """The text of the modelling files of ours that a ``config.json`` needs, by their names beside it."""
    texts: dict[str, str] = {}
    waiting = carried_modules(config)
    while waiting:
        name = waiting.pop()
        texts[f"{name}.py"] = text = modeling_file(name).read_text(encoding="utf-8")
        waiting += [other for other in needed_modules(text) if f"{other}.py" not in texts]
    return dict(sorted(texts.items()))


def needed_modules(text: str) -> list[str]:
    """The modules beside it that a modelling file imports."""
    return sorted(set(re.findall(rf"^from \.({PREFIX}\w+) import ", text, re.MULTILINE)))


def parallel_families() -> dict[str, str]:
    """Serial model types that have a parallel counterpart here, with the prefix of their classes."""
    return dict(importlib.import_module(f"{__name__}.{PARALLEL}").FAMILIES)


def parallel_config(config: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """A serial model's ``config.json`` as that of the same weights in parallel blocks. Pure; tensors keep their names.

    Args:
        config: the content of ``config.json``, serial or already (partly) parallel.
        layers: every layer that is to be parallel, 0-based.

    Returns:
        A new dictionary. Without a parallel layer left it is the serial config.

    Raises:
        UnsupportedError: the model type has no parallel counterpart here.
        UsageError: a layer that the model does not have.
    """
    file = importlib.import_module(f"{__name__}.{PARALLEL}")
    given = serial_config(config)
    model_type, count = str(given.get("model_type")), int(given.get("num_hidden_layers", 0))
    if model_type not in file.FAMILIES:
        raise UnsupportedError(
            f"model type {model_type!r} has no parallel class; choose one of {', '.join(sorted(file.FAMILIES))}"
        )
    chosen = sorted(set(layers))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise UsageError(f"layer {wrong} does not exist; the model's layers are 0 to {count - 1}")
    if not chosen:
        return given
    name = f"Parallel{file.FAMILIES[model_type]}"
    given |= {
        "model_type": file.TYPE_PREFIX + model_type,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{PARALLEL}.{name}Config",
            "AutoModel": f"{PARALLEL}.{name}Model",
            "AutoModelForCausalLM": f"{PARALLEL}.{name}ForCausalLM",
        },
        "parallel_layers": chosen,
    }
    return given


def serial_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the same weights in serial blocks, as transformers' own class reads it; a copy of a serial one."""
    file = importlib.import_module(f"{__name__}.{PARALLEL}")
    given, model_type = dict(config), str(config.get("model_type"))
    if not model_type.startswith(file.TYPE_PREFIX):
        return given
    for name in ("auto_map", "parallel_layers"):
        given.pop(name, None)
    model_type = model_type.removeprefix(file.TYPE_PREFIX)
    return given | {"model_type": model_type, "architectures": [f"{file.FAMILIES[model_type]}ForCausalLM"]}


def register() -> None:
    """Make the classes of every modelling file here known to transformers' auto classes; more than once is fine."""
    for path in sorted(Path(__file__).parent.glob(f"{PREFIX}*.py")):
        if path.stem != CORE:
            importlib.import_module(f"{__name__}.{path.stem}").register()


class _AfterImport(MetaPathFinder):
    """Finds one module as everybody would, and calls :func:`register` once it has been executed."""

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
    """Register now if transformers' auto classes are there, otherwise as soon as they are imported."""
    if AUTO_CONFIG in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
