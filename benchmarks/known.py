"""Record what transformers' classes make of plain configs, so that `rehead inspect` need not import them.

    python -m rehead.benchmarks.known            # writes models/families/known.json
    python -m rehead.benchmarks.known --check    # compares it with the installed transformers; exit code 4

A class is recorded only if :mod:`rehead.models.families.known` gives the same attributes as the class for every config
tried, and if its tensors have one set of names in every layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rehead.models.families import known
from rehead.models.families.known import KnownClass, known_config, template

FILE = Path(known.__file__).with_name("known.json")
#: Sizes of the model whose tensors are listed.
_SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 20, "max_position_embeddings": 128,
}  # fmt: skip
#: Fields that the class changes in its own ways and no model's shape depends on.
_ASIDE = ("dtype", "return_dict", "output_hidden_states", "id2label", "label2id")
#: What the facts of a model are read from.
_READ = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types",
    "sliding_window", "max_position_embeddings", "tie_word_embeddings", "vocab_size", "rope_parameters",
    "attention_chunk_size", "is_encoder_decoder", "model_type", "partial_rotary_factor", "per_layer_attributes",
    "initializer_range", "text_config",
)  # fmt: skip


def entry_of(model_type: str) -> dict[str, Any] | None:
    """The record of one class, or None where it breaks a rule."""
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    if not hasattr(config_class, "__dataclass_fields__"):
        return None
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = field.default
        if field.name in known._LABELS or field.name in _ASIDE:
            continue
        if field.default_factory is not dataclasses.MISSING or not isinstance(value, (int, float, str, type(None))):
            return None
        defaults[field.name] = value
    shapes = shapes_of(config_class, {})
    if shapes is None or not {"num_attention_heads", "hidden_size", "num_hidden_layers"} <= defaults.keys():
        return None
    entry = {
        "architecture": architecture_of(config_class),
        "defaults": defaults,
        "free": sorted(name for name in defaults if _is_free(config_class, name, defaults[name], shapes)),
        "optional": sorted(name for name in defaults if _takes_none(config_class, name)),
        "attributes": sorted(public(config_class()) - shared_attributes()),
        "aliases": dict(config_class.attribute_map),
        "shapes": shapes,
    }
    return entry if _agrees(model_type, config_class, entry) else None


def public(config: Any) -> set[str]:
    """Public names of a config's attributes and methods."""
    return {name for name in dir(config) if not name.startswith("_")} | set(config.attribute_map)


def shared_attributes() -> set[str]:
    """Those that configs of all classes have."""
    from transformers import PreTrainedConfig

    return public(PreTrainedConfig())


def architecture_of(config_class: Any) -> str:
    from rehead.models.config import causal_lm_class

    return causal_lm_class(config_class()).__name__


def _built(config_class: Any, changes: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a small model's tensors; None where the class refuses."""
    import torch

    from rehead.models.config import causal_lm_class

    sizes = {name: size for name, size in _SMALL.items() if name in {f.name for f in dataclasses.fields(config_class)}}
    try:
        config = config_class(**{**sizes, **changes})
        with torch.device("meta"):
            model = causal_lm_class(config)(config)
    except Exception:
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_of(config_class: Any, changes: dict[str, Any]) -> dict[str, list[str]] | None:
    """The class's tensors as the record has them; None where layers differ, or a dimension is no field's."""
    shapes = _built(config_class, changes)
    if shapes is None:
        return None
    fields = {f.name for f in dataclasses.fields(config_class)}
    size = _SMALL["head_dim"] if "head_dim" in fields else _SMALL["hidden_size"] // _SMALL["num_attention_heads"]
    of = {_SMALL["num_attention_heads"] * size: "queries", _SMALL["num_key_value_heads"] * size: "keys"}
    of |= {size: "head_dim"} if "head_dim" in fields else {}
    of |= {_SMALL[name]: name for name in ("vocab_size", "hidden_size", "intermediate_size") if name in fields}
    named = {template(name): [of.get(n, "?") for n in shape] for name, shape in shapes.items()}
    whole = {name.format(i=i): shape for name, shape in named.items() for i in (range(3) if "{i}" in name else (0,))}
    if whole != {name: [of.get(n, "?") for n in shape] for name, shape in shapes.items()}:
        return None
    return None if any("?" in shape for shape in named.values()) else named


def _is_free(config_class: Any, name: str, default: Any, shapes: dict[str, list[str]]) -> bool:
    """Whether the class has the same tensors with another value of a field."""
    if name in _SMALL:
        return True
    if isinstance(default, bool):
        return shapes_of(config_class, {name: not default}) == shapes
    if isinstance(default, str):
        return False
    if default is None:
        others = {"sliding_window": 64}
        return name == "layer_types" or (name in others and shapes_of(config_class, {name: others[name]}) == shapes)
    return shapes_of(config_class, {name: default * 2}) == shapes if default else False


def _takes_none(config_class: Any, name: str) -> bool:
    try:
        config_class(**{name: None})
    except Exception:
        return False
    return True


def configs(model_type: str, entry: dict[str, Any], count: int = 60) -> Iterator[dict[str, Any]]:
    """Raw configs to try: sizes, heads, windows and rope in many combinations, keys left out at random."""
    draw = random.Random(model_type)
    defaults = entry["defaults"]
    for _ in range(count):
        heads = draw.choice([4, 8, 12])
        raw: dict[str, Any] = {
            "hidden_size": heads * draw.choice([16, 32]), "num_attention_heads": heads,
            "num_hidden_layers": draw.choice([1, 2, 5]), "num_key_value_heads": draw.choice([1, 2, 4, heads, None]),
            "head_dim": draw.choice([None, 16, 64]), "sliding_window": draw.choice([None, 128, 4096]),
            "use_sliding_window": draw.choice([True, False]), "max_window_layers": draw.choice([1, 3, 28]),
            "vocab_size": draw.choice([100, 32000]), "max_position_embeddings": draw.choice([512, 4096]),
            "tie_word_embeddings": draw.choice([True, False]), "initializer_range": draw.choice([0.01, 0.02]),
        }  # fmt: skip
        kinds = draw.choices(known._KINDS, k=raw["num_hidden_layers"])
        raw = {key: value for key, value in raw.items() if key in defaults and draw.random() < 0.8}
        if "layer_types" in defaults and "num_hidden_layers" in raw and draw.random() < 0.3:
            raw["layer_types"] = kinds
        rope = draw.choice(["none", "theta", "parameters", "linear", "partial"])
        if "rope_parameters" in defaults and rope != "none":
            ropes: dict[str, dict[str, Any]] = {
                "theta": {"rope_theta": 500000.0},
                "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
                "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
                "partial": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            }
            raw |= ropes[rope]
        if draw.random() < 0.5:
            raw |= {"architectures": [entry["architecture"]], "dtype": draw.choice(["bfloat16", "float32"])}
        yield {"model_type": model_type, **raw}


def _agrees(model_type: str, config_class: Any, entry: dict[str, Any]) -> bool:
    """Whether the record gives the class's own attributes for every config tried, and answers at least some."""
    from unittest.mock import patch

    answered, record = 0, {model_type: KnownClass.of(entry, shared_attributes())}
    with patch.object(known, "known_classes", lambda: record):
        for raw in configs(model_type, entry):
            config = known_config(raw)
            if config is None:
                continue
            answered += 1
            if differing(config, config_class.from_dict(json.loads(json.dumps(raw)))):
                return False
    return answered > 5


def differing(config: Any, real: Any) -> list[str]:
    """Attributes in which a config from the record differs from the class's own."""
    missing = object()
    wrong = []
    for name in sorted({*_READ, *config.known.defaults}):
        expected = getattr(real, name, missing)
        try:
            value = getattr(config, name)
        except AttributeError:
            value = missing
        if value != expected and not (expected is missing and value is None):
            wrong.append(name)
    return wrong


def main(argv: list[str] | None = None) -> None:
    """Write the record, or compare it."""
    import transformers

    from rehead.models.families.table import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Compare the record with the installed transformers.")
    parser.add_argument("types", nargs="*", help="Model types; all in the table when none is named.")
    options = parser.parse_args(argv)
    classes = {}
    for model_type in options.types or FAMILIES:
        if (entry := entry_of(model_type)) is not None:
            classes[model_type] = entry
    if options.check:
        recorded = json.loads(FILE.read_text(encoding="utf-8"))["classes"]
        wrong = [name for name, entry in recorded.items() if classes.get(name) != entry]
        print(
            f"{len(recorded)} classes recorded; "
            + (f"other than recorded: {', '.join(wrong)}" if wrong else "all as recorded")
        )
        sys.exit(4 if wrong else 0)
    lines = [f'  "{name}": {json.dumps(classes[name], sort_keys=True)}' for name in sorted(classes)]
    shared = json.dumps(sorted(shared_attributes()))
    head = f'{{\n "transformers": "{transformers.__version__}",\n "attributes": {shared},\n "classes": {{\n'
    text = head + ",\n".join(lines) + "\n }\n}\n"
    FILE.write_text(text, encoding="utf-8")
    print(f"{len(classes)} classes recorded: {', '.join(classes)}")


if __name__ == "__main__":
    main()
