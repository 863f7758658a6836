"""Infer the family of a model type that the table lacks, from names, shapes and a probe of the class's own rotation.

A guess is careful: any tensor beside the usual ones makes it refuse, and an unknown norm or rotation allows
no change of the keys' basis, so that methods do not rotate them. It is still a guess, and marked as one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rehead.errors import UnsupportedError
from rehead.models.families.spec import (
    Config,
    Family,
    KeyNorm,
    Names,
    Pairing,
    head_dim,
    kv_heads,
    query_heads,
    rotary_partial,
)

_QUERY = re.compile(r"^(?P<layer>(?:.*\.)?(?:layers|h|blocks)\.)(?P<i>\d+)\.(?P<attention>(?:\w+\.)+?)q_proj\.weight$")
_OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


def guess_family(config: Config, tensors: Mapping[str, Any]) -> Family:
    """Infer a family from ``...{q,k,v,o}_proj`` tensors whose shapes fit the config.

    Args:
        config: a resolved config.
        tensors: by name, each with a ``shape``.

    Returns:
        A family with ``guessed`` set.

    Raises:
        UnsupportedError: names or shapes are not the usual ones; says which.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for name in tensors:
        if match := _QUERY.match(name):
            places.setdefault((match["layer"], match["attention"]), []).append(int(match["i"]))
    if not places:
        raise _unknown(config, "has no q_proj, k_proj and v_proj in its layers")
    if len(places) > 1:
        raise _unknown(config, f"has attention in several places ({', '.join(a + '*.' + b for a, b in places)})")
    ((start, attention), indices) = next(iter(places.items()))
    layers = sorted(set(indices))
    prefix = f"{start}{layers[0]}.{attention}"
    if getattr(config, "num_key_value_heads", None) is None:
        raise _unknown(config, "has no num_key_value_heads in its config, so no config can load fewer")
    if getattr(config, "hidden_size", None) is None:
        raise _unknown(config, "has no hidden_size in its config")
    output = next((stem for stem in _OUTPUTS if f"{prefix}{stem}.weight" in tensors), None)
    if output is None:
        raise _unknown(config, f"has no output projection beside {prefix}q_proj.weight")
    for layer in layers:
        _check_shapes(config, f"{start}{layer}.{attention}", output, tensors)
    norms = next((pair for pair in _NORMS if f"{prefix}{pair[1]}.weight" in tensors), _NORMS[0])
    names = Names(output=output, query_norm=norms[0], key_norm=norms[1])
    extras = {_check_rest(config, f"{start}{layer}.{attention}", names, tensors) for layer in layers}
    suffix = f"{layers[0]}.{attention}".rstrip(".")
    module = _check_modules(config, suffix, names)
    pairing = probe_pairing(config)
    # With an unknown rotation a key's basis must not change; "layer" is the norm that forbids every change.
    norm: KeyNorm = "layer" if pairing is None else _guess_norm(config, prefix, names, tensors)
    attending = frozenset(layers)
    return Family(
        config.model_type,
        layer=module.removesuffix(suffix) + "{i}.",
        layer_aliases=(start + "{i}.",),
        attention=attention,
        names=names,
        key_norm=norm,
        pairing=pairing or "half",
        rotary_dims=rotary_partial,
        has_attention=lambda config, layer: layer in attending,
        query_extras=max(extras, key=len),
        guessed=True,
        notes="inferred from names and shapes",
    )


def _check_shapes(config: Config, prefix: str, output: str, tensors: Mapping[str, Any]) -> None:
    heads, kv, size, width = query_heads(config), kv_heads(config), head_dim(config), config.hidden_size
    wanted = {"q_proj": heads * size, "k_proj": kv * size, "v_proj": kv * size}
    for stem, rows in wanted.items():
        info = tensors.get(f"{prefix}{stem}.weight")
        if info is None or len(info.shape) != 2 or info.shape[0] != rows:
            shape = "missing" if info is None else "x".join(map(str, info.shape))
            raise _unknown(config, f"has {prefix}{stem}.weight {shape} where its config means {rows} rows")
        if info.shape[1] != width:
            raise _unknown(config, f"has {prefix}{stem}.weight {info.shape[1]} wide, not {width} as its hidden states")
    info = tensors[f"{prefix}{output}.weight"]
    if len(info.shape) != 2 or info.shape[1] != heads * size:
        raise _unknown(config, f"has {prefix}{output}.weight {'x'.join(map(str, info.shape))}, not {heads * size} wide")


def _check_rest(config: Config, prefix: str, names: Names, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """The extra tensors of the query heads; refuses any tensor of the attention module whose purpose is unknown."""
    stems = (names.query, names.key, names.value, names.output, names.query_norm, names.key_norm)
    extras = []
    for name in tensors:
        below = name.removeprefix(prefix)
        if below == name or below.rsplit(".", 1)[0] in stems or below == "rotary_emb.inv_freq":
            continue
        if below == "sinks" and tuple(tensors[name].shape) == (query_heads(config),):
            extras.append(below)
            continue
        raise _unknown(config, f"has {name} in its attention, whose part is unknown")
    return tuple(extras)


def _check_modules(config: Config, suffix: str, names: Names) -> str:
    """The class's name of the module that ends in ``suffix``; the checkpoint's prefix may differ.

    Refuses a class whose attention has unknown submodules, since a norm may have no weights in the checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM

    known = {names.query, names.key, names.value, names.output, names.query_norm, names.key_norm, "rotary_emb"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _unknown(config, f"has a class that cannot be built from its config ({type(error).__name__})") from None
    modules = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{suffix}")]
    if len(modules) != 1:
        raise _unknown(config, f"has no module {suffix} in its class")
    for name, part in model.get_submodule(modules[0]).named_children():
        normed = name in (names.query_norm, names.key_norm) and not list(part.parameters())
        if normed or not (name in known or isinstance(part, (torch.nn.Dropout, torch.nn.Identity))):
            raise _unknown(config, f"has a part {name} ({type(part).__name__}) in its attention that is unknown")
    return modules[0]


def _guess_norm(config: Config, prefix: str, names: Names, tensors: Mapping[str, Any]) -> KeyNorm:
    """The key norm by its weight's shape; a weight of one head counts as LayerNorm, which allows the fewest changes."""
    info = tensors.get(f"{prefix}{names.key_norm}.weight")
    if info is None:
        return "none"
    kv, size, shape = kv_heads(config), head_dim(config), tuple(info.shape)
    if shape == (size,):
        return "layer"
    if shape == (kv, size):
        return "layer_own"
    if shape == (kv * size,):
        return "rms_span"
    raise _unknown(config, f"has {prefix}{names.key_norm}.weight {'x'.join(map(str, shape))}, a norm of unknown span")


def probe_pairing(config: Config) -> Pairing | None:
    """Which dimensions the class's ``apply_rotary_pos_emb`` rotates together; measured by rotating unit vectors.

    Returns:
        ``"half"``, ``"interleaved"``, or None where the class has no such function or it does something else.
    """
    import sys

    import torch
    from transformers import AutoModelForCausalLM

    classes = AutoModelForCausalLM._model_mapping.get(type(config), None)
    model_class = classes[0] if isinstance(classes, (tuple, list)) else classes
    module = sys.modules.get(getattr(model_class, "__module__", ""))
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    if rotate is None:
        return None
    dims = 8
    angles = torch.arange(1, dims // 2 + 1, dtype=torch.float32) / 10
    units = torch.eye(dims).reshape(1, 1, dims, dims)  # the "sequence" is one unit vector after another
    for pairing, doubled in (
        ("half", torch.cat([angles, angles])),
        ("interleaved", angles.repeat_interleave(2)),
        ("interleaved", torch.cat([angles, angles])),
    ):
        cos, sin = (fn(doubled).expand(1, dims, dims) for fn in (torch.cos, torch.sin))
        try:
            turned = rotate(units, units, cos, sin)[1].reshape(dims, dims)
        except Exception:
            return None
        first = torch.arange(dims // 2)
        other = first + dims // 2 if pairing == "half" else 2 * first + 1
        first = first if pairing == "half" else 2 * first
        expected = torch.zeros(dims, dims)
        expected[first, first] = expected[other, other] = angles.cos()
        expected[first, other], expected[other, first] = angles.sin(), -angles.sin()
        if torch.allclose(turned, expected, atol=1e-6) or torch.allclose(turned, expected.T, atol=1e-6):
            return pairing  # type: ignore[return-value]
    return None


def _unknown(config: Config, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{config.model_type}: is not in Rehead's table and {what}; add an entry to models/families/table.py"
    )
