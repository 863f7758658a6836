"""A longer context for models with a table of positions, sinusoids or biases by distance in place of rotary pairs.

Learned tables are resized and need uptraining; sinusoids are computed anew by their class from the number in the
config; T5's biases by distance (Raffel et al. 2020, arXiv 1910.10683) reach as much further as the context grows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import resolve_config
from rehead.models.families.parallel import base_type
from rehead.models.model import Model
from rehead.models.rewrite import Derived, Rewrite, unchanged
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.rope import stretch
from rehead.variants.contract import ALL


@dataclass(frozen=True)
class Table:
    """Where a class keeps its positions.

    Attributes:
        length: the config key with their number.
        tensor: the end of the table's name in a checkpoint; None where the class computes it.
        offset: rows before position 0.
        reach: the config key with the largest distance that a bias tells from larger ones.
    """

    length: str
    tensor: str | None = None
    offset: int = 0
    reach: str | None = None


TABLES = {
    "gpt2": Table("n_positions", "wpe.weight"),
    "gpt_bigcode": Table("n_positions", "wpe.weight"),
    "gpt_neo": Table("max_position_embeddings", "wpe.weight"),
    "opt": Table("max_position_embeddings", "embed_positions.weight", 2),
    "biogpt": Table("max_position_embeddings", "embed_positions.weight", 2),
    "xglm": Table("max_position_embeddings"),
    "t5": Table("n_positions", reach="relative_attention_max_distance"),
    "rehead_t5": Table("n_positions", reach="relative_attention_max_distance"),
}


def nothing_to_stretch(kind: str) -> str | None:
    """Why a model of a type whose heads do not rotate has no positions to stretch; None where it has a table."""
    if base_type(kind) in TABLES:
        return None
    return (
        f"{kind}: has neither rotary positions nor a table of them, so there is nothing to stretch; its texts are "
        "limited by nothing but what it was trained at"
    )


def resized(model: Model, options: ContextOptions) -> Rewrite:
    """A model whose table has a row for each of ``options.tokens`` positions; no weight is read.

    Raises:
        UsageError: not more positions than there are, or rotary pairs are spoken of.
        UnsupportedError: single layers are named, or there is no table in the checkpoint.
    """
    kind = str(model.config.model_type)
    table = TABLES[base_type(kind)]
    if options.rope != "yarn":
        raise UsageError(f"{kind}: has a table of positions and no rotary pairs; leave --rope out")
    if options.layers != ALL:
        raise UnsupportedError(f"{kind}: all layers share its positions; leave --layers out")
    raw = dict(model.source.config)
    trained = int(options.trained or resolve_config(raw, model.source.id).to_dict().get(table.length) or 512)
    factor = stretch(trained, options)
    raw[table.length] = options.tokens
    if table.reach is not None:
        raw[table.reach] = round(float(getattr(model.config, table.reach)) * factor)
    rewrite = unchanged("context", raw, model.family, model.source.tensors)
    if table.tensor is None:
        return replace(rewrite, exact=False, layers=tuple(model.layers))
    name = next((name for name in model.source.tensors if name.endswith(table.tensor)), None)
    if name is None:
        raise UnsupportedError(f"{model.source.id}: has no tensor {table.tensor}; check that its files are complete")
    width = model.source.tensors[name].shape[1]

    def grow(old: Tensor) -> Tensor:
        return longer(old, options.tokens, table.offset, options.table)

    tensors = {**rewrite.tensors, name: Derived((name,), (options.tokens + table.offset, width), grow)}
    return replace(rewrite, tensors=tensors, exact=False, layers=tuple(model.layers))


def longer(table: Tensor, positions: int, offset: int = 0, how: str = "interpolate") -> Tensor:
    """A table of positions ``[offset + L, D]`` with a row for each of ``positions``, ``[offset + positions, D]``.

    Args:
        offset: rows before position 0, which stay.
        how: ``"interpolate"`` puts new rows between the old ones; ``"repeat"`` says the old ones again, so that the
            first L stay as they are.
    """
    before, rows = table[:offset], table[offset:]
    if how == "repeat":
        return torch.cat([before, rows[torch.arange(positions, device=rows.device) % len(rows)]])
    at = torch.linspace(0, len(rows) - 1, positions, dtype=torch.float64, device=rows.device)
    low = at.floor().long().clamp(max=max(0, len(rows) - 2))
    share = (at - low)[:, None].float()
    wide = rows.float()
    between = wide[low] * (1 - share) + wide[(low + 1).clamp(max=len(rows) - 1)] * share
    return torch.cat([before, between.to(table.dtype)])
