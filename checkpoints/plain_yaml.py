"""Read untrusted YAML as plain values: text, numbers, true and false, lists and mappings, with limits on size.

Dates stay text, ``yes`` and ``no`` too. A value cannot contain itself, and aliases cannot expand a small file into a
huge value.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

MAX_NODES = 200_000
MAX_DEPTH = 64
MAX_DIGITS = 40


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: invalid YAML, a key that is not text or appears twice, an alias of itself, or more than
            :data:`MAX_NODES` values with its aliases expanded; has ``problem`` and mostly ``problem_mark``.
    """
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, base-60 numbers, ``yes``/``no`` as booleans, and duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                raise _problem(f"key {str(key)[:40]} is not text", key_node)
            if key in seen:
                raise _problem(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node)).replace("_", "")
        if len(text) > MAX_DIGITS:
            raise _problem(f"a number of {len(text)} characters", node)
        try:
            return int(text) if node.tag.endswith(":int") else float(re.sub(r"\.(?=[iInN])", "", text))
        except ValueError:
            raise _problem(f"{text!r} is not a number", node) from None


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)  # type: ignore[type-var]
for _tag in ("timestamp", "binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)  # type: ignore[type-var]


def _problem(what: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _check_depth(text: str) -> None:
    """Raise if a text is nested too deep for the recursive steps that follow; this check itself is not recursive."""
    depth = 0
    for event in yaml.parse(text, _Loader):  # type: ignore[no-untyped-call]
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            depth -= 1
        if depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", None)


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below a node with every alias expanded; ``sizes`` remembers them by the node's id."""
    known = sizes.get(id(node))
    if known is not None:
        if not known:
            raise _problem("refers to itself", node)
        return known
    sizes[id(node)] = 0
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
    total = 1 + sum(_size(part, sizes) for part in parts)
    if total > MAX_NODES:
        raise _problem(f"has more than {MAX_NODES} values once its aliases are expanded", node)
    sizes[id(node)] = total
    return total
