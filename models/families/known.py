"""What transformers' classes make of a plain config, recorded, so that a checkpoint can be read without importing it.

Importing torch and transformers takes seconds, reading headers a few milliseconds. ``known.json`` beside this file has,
for classes whose config follows a few simple rules, the config's defaults and the shapes of the class's tensors. It is
written by ``python -m rehead.benchmarks.known``, which tries each rule on the class itself and leaves out a class that
breaks one. A config with anything unusual in it is not answered from here, and transformers is asked as always.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from rehead.models.families.spec import head_dim, kv_heads, query_heads

#: Keys of a config.json that have no part in a model's shape, and the types that every class takes for them.
_LABELS: dict[str, tuple[type, ...]] = {
    "_name_or_path": (str,), "architectures": (list,), "model_type": (str,), "transformers_version": (str,),
    "bos_token_id": (int,), "eos_token_id": (int, list), "pad_token_id": (int,), "unk_token_id": (int,),
    "use_cache": (bool,),
}  # fmt: skip
_KINDS = ("full_attention", "sliding_attention")
_DTYPES = ("float32", "bfloat16", "float16")
#: Rope scalings that leave all parameters as they are given.
_ROPES = ("default", "linear", "dynamic")
#: The newest transformers whose classes were compared with the record; of a newer one the classes are asked.
COMPARED = (5, 24)
_ROPE_KEYS = frozenset({"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor"})


@dataclass(frozen=True)
class KnownClass:
    """What is recorded of a class.

    Attributes:
        architecture: the class's name.
        defaults: the config's fields before anything is derived from them.
        free: fields that change no tensor's name; the others must have their defaults.
        optional: fields that may be None.
        attributes: every public name that a config of the class has.
        aliases: the config's other names for fields.
        shapes: by the name of each tensor, with ``{i}`` for the layer, the config's field that gives each dimension;
            "queries" and "keys" are the rows of all query heads and of all KV heads.
    """

    architecture: str
    defaults: Mapping[str, Any]
    free: frozenset[str]
    optional: frozenset[str]
    attributes: frozenset[str]
    aliases: Mapping[str, str]
    shapes: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, entry: Mapping[str, Any], shared: Iterable[str]) -> KnownClass:
        """The record from its JSON, and the names that configs of all classes have."""
        sets = {key: frozenset(entry[key]) for key in ("free", "optional")}
        sets["attributes"] = frozenset((*entry["attributes"], *shared))
        shapes = {name: tuple(fields) for name, fields in entry["shapes"].items()}
        return cls(entry["architecture"], entry["defaults"], aliases=entry["aliases"], shapes=shapes, **sets)

    def holds(self, shapes: Mapping[str, tuple[int, ...]], config: KnownConfig) -> bool:
        """Whether a checkpoint has exactly this class's tensors, of its shapes; a tied head must be left out."""
        layers = range(config.num_hidden_layers)
        if len(layers) > len(shapes):
            return False
        rows = {"queries": query_heads(config) * head_dim(config), "keys": kv_heads(config) * head_dim(config)}
        wanted: dict[str, tuple[int, ...]] = {}
        for name, fields in self.shapes.items():
            shape = tuple(rows[field] if field in rows else getattr(config, field) for field in fields)
            wanted |= dict.fromkeys((name.format(i=i) for i in layers) if "{i}" in name else (name,), shape)
        if config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)
        return wanted == shapes


class KnownConfig:
    """A config's attributes as the class would have them; whatever else is asked for comes from the class itself."""

    def __init__(self, raw: Mapping[str, Any], known: KnownClass, fields: Mapping[str, Any]) -> None:
        self._raw, self._known = raw, known
        self._real: Any = None
        self.__dict__.update(fields)

    @property
    def known(self) -> KnownClass:
        """The record of the class."""
        return self._known

    def __getattr__(self, name: str) -> Any:
        if name in self._known.aliases:
            return getattr(self, self._known.aliases[name])
        if name.startswith("__") or not (name.startswith("_") or name in self._known.attributes):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.real(), memo)

    def real(self) -> Any:
        """transformers' own config object."""
        if self._real is None:
            from transformers import CONFIG_MAPPING

            self._real = CONFIG_MAPPING[self._raw["model_type"]].from_dict(copy.deepcopy(dict(self._raw)))
        return self._real


@cache
def known_classes() -> dict[str, KnownClass]:
    """The record by model type; none with a transformers that nobody compared it with."""
    if tuple(int(part) for part in version("transformers").split(".")[:2]) > COMPARED:
        return {}
    table = json.loads((files("rehead.models.families") / "known.json").read_text(encoding="utf-8"))
    return {model_type: KnownClass.of(entry, table["attributes"]) for model_type, entry in table["classes"].items()}


def known_config(raw: Mapping[str, Any]) -> KnownConfig | None:
    """The config of a raw ``config.json`` if its class is recorded and all that it says is plain, else None."""
    model_type = raw.get("model_type")
    known = known_classes().get(model_type) if isinstance(model_type, str) else None
    if known is None or raw.get("architectures") not in (None, [known.architecture]):
        return None
    fields = dict(known.defaults)
    for key, value in raw.items():
        name = known.aliases.get(key, key)
        if key in _LABELS:
            if not (value is None or isinstance(value, _LABELS[key])):
                return None
        elif name in fields and name != "rope_parameters":
            plain = name in known.optional if value is None else _like(value, fields[name], name)
            if not plain or (name not in known.free and value != fields[name]):
                return None
            fields[name] = value
        elif key in ("dtype", "torch_dtype"):
            if value not in _DTYPES:
                return None
        elif key not in ("rope_parameters", "rope_scaling", "rope_theta") and not _is_note(key, value):
            return None
    return _derived(raw, known, fields)


def _derived(raw: Mapping[str, Any], known: KnownClass, fields: dict[str, Any]) -> KnownConfig | None:
    """The config with what classes derive from other fields; None where they would refuse it."""
    heads, width, layers = (fields.get(name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if not (_counts(heads) and _counts(width) and _counts(layers)) or width % heads:  # type: ignore[operator]
        return None
    if "head_dim" in fields and fields["head_dim"] is None:
        fields["head_dim"] = width // heads  # type: ignore[operator]
    kv = fields.get("num_key_value_heads", heads)
    if kv is None:
        fields["num_key_value_heads"] = kv = heads
    if not _counts(kv) or heads % kv or not _counts(fields.get("head_dim", 1)):  # type: ignore[operator]
        return None
    if not 0 <= fields.get("initializer_range", 0.0) <= 1 or len(fields.get("layer_types") or ()) not in (0, layers):
        return None
    if "use_sliding_window" in fields:  # Qwen: layers from max_window_layers on have the window, if it is switched on
        window = fields["sliding_window"] if fields["use_sliding_window"] else None
        fields["sliding_window"] = window
        if fields.get("layer_types") is None:
            windowed = [window is not None and i >= fields["max_window_layers"] for i in range(layers)]  # type: ignore[arg-type]
            fields["layer_types"] = ["sliding_attention" if yes else "full_attention" for yes in windowed]
    if "rope_parameters" in fields:
        rope = _rope(raw, fields.get("partial_rotary_factor"))
        if rope is None:
            return None
        fields["rope_parameters"] = rope
    fields |= {"model_type": raw["model_type"], "architectures": raw.get("architectures"), "is_encoder_decoder": False}
    return KnownConfig(raw, known, fields | {"per_layer_attributes": None})


def _rope(raw: Mapping[str, Any], factor: float | None) -> dict[str, Any] | None:
    """RoPE's parameters as the classes keep them; None for any but the simplest."""
    scaling, theta = raw.get("rope_scaling"), raw.get("rope_theta", 10000.0)
    rope = dict(scaling or raw.get("rope_parameters") or {}) if isinstance(scaling, (dict, type(None))) else None
    if rope is None or not isinstance(raw.get("rope_parameters"), (dict, type(None))) or rope.keys() - _ROPE_KEYS:
        return None
    rope.setdefault("rope_theta", theta)
    if factor is not None:
        rope.setdefault("partial_rotary_factor", factor)
    rope.setdefault("rope_type", rope.get("type", "default"))
    numbers = (rope["rope_theta"], rope.get("factor", 1.0), rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] not in _ROPES or not all(_number(number) and number > 0 for number in numbers):
        return None
    return rope if rope["rope_type"] == "default" or rope.get("factor", 0.0) >= 1.0 else None


def _like(value: Any, default: Any, name: str) -> bool:
    """Whether a value is of the kind that the class takes without a word: as its default is."""
    if name == "layer_types":
        return isinstance(value, list) and all(kind in _KINDS for kind in value)
    if default is None:
        return name in ("head_dim", "num_key_value_heads", "sliding_window") and _counts(value)
    if isinstance(default, (bool, str)):
        return type(value) is type(default)
    if isinstance(default, int):
        return type(value) is int and (value > 0 or value == default)
    return isinstance(default, float) and _number(value) and type(value) is float


def _is_note(key: str, value: Any) -> bool:
    """Whether an entry only says where a model came from (``_model_name_or_path``, ``unsloth_version``)."""
    return isinstance(value, str) and key.endswith(("_name_or_path", "_version"))


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def template(name: str) -> str:
    """A tensor's name with ``{i}`` for its first number."""
    return re.sub(r"\.\d+\.", ".{i}.", name, count=1)
