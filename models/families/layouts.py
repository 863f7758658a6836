"""Convert a layer's tensors to :class:`~rehead.models.heads.Heads` and back, for every packing, without loss.

``split(merge(heads)) == heads`` bit for bit: rows are only reordered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rehead.lazy import late
from rehead.models.families.spec import Config, Family
from rehead.models.heads import Heads, rotary_pairs

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

# Norms whose weights have one row for each head and so change size with the heads.
RESIZED_NORMS = ("rms_span", "layer_own")

# The key in Heads.extras of an output gate that shares a projection with the queries.
GATE = "gate"


def tensor_names(family: Family, config: Config, layer: int, present: Mapping[str, object]) -> list[str]:
    """Names of the ``present`` tensors that hold a layer's heads, in a fixed order.

    Norm weights that all heads share are not included, since they do not change with the heads.
    """
    prefix, names = family.prefix(layer), family.names
    stems = [names.query] if family.packing != "separate" else [names.query, names.key, names.value]
    wanted = [f"{prefix}{stem}.{part}" for stem in [*stems, names.output] for part in ("weight", "bias")]
    if family.norm_of(config, layer) in RESIZED_NORMS:
        for stem in (names.query_norm, names.key_norm):
            wanted.append(f"{prefix}{stem}.weight")
            # StableLM keeps a LayerNorm module for each head.
            heads = family.num_heads(config)
            wanted += [f"{prefix}{stem}.norms.{h}.weight" for h in range(heads)]
    wanted += [prefix + name for name in family.query_extras]
    return [name for name in wanted if name in present]


def shared_norm_names(family: Family, config: Config, layer: int, present: Mapping[str, object]) -> list[str]:
    """Names of the ``present`` query and key norm weights of a layer that all its heads share."""
    if family.norm_of(config, layer) in (*RESIZED_NORMS, "none"):
        return []
    prefix, names = family.prefix(layer), family.names
    wanted = [f"{prefix}{stem}.weight" for stem in (names.query_norm, names.key_norm)]
    return [name for name in wanted if name in present]


def head_shapes(
    family: Family, config: Config, layer: int, present: Mapping[str, Any], kv: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's attention tensors with ``kv`` KV heads; a tensor of a head that is gone is left out.

    Args:
        family: the checkpoint's family.
        config: the checkpoint's resolved config; its number of KV heads does not count.
        layer: the layer's index.
        present: the checkpoint's tensors by name; each has a ``shape``, which gives the sizes that heads do not decide.
        kv: number of KV heads.
    """
    heads, size, prefix, names = family.num_heads(config), family.head_dim(config), family.prefix(layer), family.names
    queries = heads * size * (2 if family.gate_in_query else 1)
    rows = {names.query: queries, names.key: kv * size, names.value: kv * size}
    if family.packing != "separate":
        rows = {names.query: queries + 2 * kv * size}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in tensor_names(family, config, layer, present):
        shape, below = tuple(present[name].shape), name.removeprefix(prefix)
        stem, _, part = below.rpartition(".")
        if below in family.query_extras:
            pass
        elif stem in rows:
            fixed = 0 if part == "bias" or not family.transposed else len(shape) - 1
            shape = (*shape[:fixed], rows[stem], *shape[fixed + 1 :])
        elif stem == names.output and part == "weight":
            shape = (heads * size, *shape[1:]) if family.transposed else (*shape[:-1], heads * size)
        elif stem in (names.query_norm, names.key_norm):
            count = heads if stem == names.query_norm else kv
            shape = (count * size,) if len(shape) == 1 else (count, size)
        of_head = re.fullmatch(re.escape(names.key_norm) + r"\.norms\.(\d+)", stem)
        if of_head is None or int(of_head[1]) < kv:
            shapes[name] = shape
    return shapes


def split(family: Family, config: Config, layer: int, tensors: Mapping[str, Tensor], kv: int | None = None) -> Heads:
    """One layer's heads from its tensors.

    Args:
        family: the checkpoint's family.
        config: the checkpoint's resolved config.
        layer: the layer's index.
        tensors: by full name; those of :func:`tensor_names` and, if any, :func:`shared_norm_names`.
        kv: number of KV heads in the tensors; the config's when None.

    Returns:
        :class:`Heads` of views into ``tensors`` wherever the layout allows.
    """
    heads, kv = family.num_heads(config), kv or family.num_kv_heads(config)
    size, prefix, names = family.head_dim(config), family.prefix(layer), family.names

    def read(stem: str, part: str) -> Tensor | None:
        tensor = tensors.get(f"{prefix}{stem}.{part}")
        return tensor.T if tensor is not None and family.transposed and part == "weight" else tensor

    fields: dict[str, Tensor | None] = {}
    extras: dict[str, Tensor] = {}
    for part, suffix in (("weight", ""), ("bias", "_bias")):
        if family.packing == "separate":
            rows = [read(stem, part) for stem in (names.query, names.key, names.value)]
        else:
            rows = list(_unpack(read(names.query, part), family.packing, heads, kv, size))
        if family.gate_in_query and rows[0] is not None:
            both = rows[0].reshape(heads, 2, size, *rows[0].shape[1:])
            rows[0], extras[GATE + suffix] = both[:, 0].flatten(0, 1), both[:, 1]
        for name, tensor, count in zip("qkv", rows, (heads, kv, kv)):
            fields[name + suffix] = None if tensor is None else tensor.reshape(count, size, *tensor.shape[1:])
    output = read(names.output, "weight")
    assert output is not None
    fields["o"] = output.reshape(output.shape[0], heads, size)
    fields["o_bias"] = read(names.output, "bias")
    for name in family.query_extras:
        extra = tensors.get(prefix + name)
        if extra is not None:
            extras[name] = extra.reshape(heads, -1, *extra.shape[1:])

    norm = family.norm_of(config, layer)
    if norm in RESIZED_NORMS:
        for field, stem, count in (("q_norm", names.query_norm, heads), ("k_norm", names.key_norm, kv)):
            whole = tensors.get(f"{prefix}{stem}.weight")
            each = [tensors.get(f"{prefix}{stem}.norms.{h}.weight") for h in range(count)]
            if whole is not None:
                fields[field] = whole.reshape(count, size)
            elif all(tensor is not None for tensor in each):
                fields[field] = torch.stack(each)  # type: ignore[arg-type]
    elif norm != "none":
        fields["q_norm"] = tensors.get(f"{prefix}{names.query_norm}.weight")
        fields["k_norm"] = tensors.get(f"{prefix}{names.key_norm}.weight")
    return Heads(
        **fields,  # type: ignore[arg-type]
        pairs=rotary_pairs(family.pairing, family.rotary_dims(config, layer)),
        key_norm=norm,
        norm_offset=family.norm_offset,
        fixed_values=family.fixed_values_of(config),
        extras=extras,
    )


def merge(family: Family, layer: int, heads: Heads, like: Mapping[str, object]) -> dict[str, Tensor]:
    """One layer's tensors from its heads; the inverse of :func:`split`.

    Args:
        family: the family whose names and packing to use.
        layer: the layer's index.
        heads: the layer's heads.
        like: the layer's source tensors or their headers by name, to see which form of norm the checkpoint uses.

    Returns:
        Contiguous tensors by full name, without norm weights that all heads share.
    """
    prefix, names = family.prefix(layer), family.names
    result: dict[str, Tensor] = {}
    for part, suffix in (("weight", ""), ("bias", "_bias")):
        q, k, v = (getattr(heads, name + suffix) for name in "qkv")
        if q is not None and family.gate_in_query:
            q = torch.cat([q, heads.extras[GATE + suffix]], dim=1)
        if family.packing == "separate":
            rows = {names.query: q, names.key: k, names.value: v}
            rows = {stem: tensor.flatten(0, 1) for stem, tensor in rows.items() if tensor is not None}
        else:
            rows = {names.query: _pack(q, k, v, family.packing)} if q is not None else {}
        for stem, tensor in rows.items():
            turned = tensor.T if family.transposed and part == "weight" else tensor
            result[f"{prefix}{stem}.{part}"] = turned.contiguous()
    output = heads.o.flatten(1, 2)
    result[f"{prefix}{names.output}.weight"] = (output.T if family.transposed else output).contiguous()
    if heads.o_bias is not None:
        result[f"{prefix}{names.output}.bias"] = heads.o_bias.contiguous()
    for name in family.query_extras:
        if name in heads.extras:
            result[prefix + name] = heads.extras[name].flatten(0, 1).contiguous()
    if heads.key_norm in RESIZED_NORMS:
        for stem, weight in ((names.query_norm, heads.q_norm), (names.key_norm, heads.k_norm)):
            if weight is None:
                continue
            whole = like.get(f"{prefix}{stem}.weight")
            if whole is not None:
                flat = len(getattr(whole, "shape", ())) == 1
                result[f"{prefix}{stem}.weight"] = (weight.flatten() if flat else weight).contiguous()
            else:
                for h, row in enumerate(weight):
                    result[f"{prefix}{stem}.norms.{h}.weight"] = row.contiguous()
    return result


def _unpack(fused: Tensor | None, packing: str, heads: int, kv: int, size: int) -> tuple[Tensor | None, ...]:
    """Rows of a fused tensor [(H + 2K) * D, ...] as (q, k, v)."""
    if fused is None:
        return None, None, None
    if packing == "blocks":
        return tuple(fused.split([heads * size, kv * size, kv * size]))
    if packing == "quarters":
        parts = fused.reshape(4, 3, -1, *fused.shape[1:])
        return parts[:, 0].flatten(0, 1), parts[:, 2].flatten(0, 1), parts[:, 1].flatten(0, 1)
    grouped = fused.reshape(kv, heads // kv + 2, size, *fused.shape[1:])
    return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def _pack(q: Tensor, k: Tensor, v: Tensor, packing: str) -> Tensor:
    """The inverse of :func:`_unpack`, from tensors [heads, D, ...]."""
    if packing == "blocks":
        return torch.cat([part.flatten(0, 1) for part in (q, k, v)])
    if packing == "quarters":
        return torch.stack([part.flatten(0, 1).unflatten(0, (4, -1)) for part in (q, v, k)], 1).flatten(0, 2)
    kv = k.shape[0]
    grouped = torch.cat([q.reshape(kv, -1, *q.shape[1:]), k[:, None], v[:, None]], dim=1)
    return grouped.flatten(0, 2)
