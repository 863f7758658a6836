"""From a model to the same weights in blocks of the other form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import resolve_config
from rehead.models.families import resolve_family
from rehead.models.families.parallel import WINDOW_PREFIX, base_type
from rehead.models.families.table import FAMILIES
from rehead.models.model import Model
from rehead.models.modeling import without_remote_code
from rehead.models.rewrite import Rewrite, unchanged
from rehead.variants.blocks.switches import SWITCHES
from rehead.variants.layer_choice import parse_layers

PARALLEL, SERIAL = FORMS = ("parallel", "serial")


def reblock(model: Model, form: str, layers: str | Sequence[int] | None = None, plain: bool = False) -> Rewrite:
    """A model with blocks of the other form, by its config and, where the class wants it, its weights.

    Args:
        form: ``"parallel"`` or ``"serial"``.
        layers: which layers change; see :func:`~rehead.variants.layer_choice.parse_layers`.
        plain: refuse what transformers' own classes cannot express.

    Raises:
        UsageError: a layer that does not exist, or nothing would change.
        UnsupportedError: the class cannot express the form.
    """
    from rehead.models.modeling import parallel_families

    chosen = parse_layers(layers, int(model.config.num_hidden_layers))
    kind = model.config.model_type
    if kind in SWITCHES:
        return _switched(model, form, chosen)
    if kind.startswith(WINDOW_PREFIX):
        raise UnsupportedError(f"{kind}: Rehead's class with windows has no other blocks; convert it from before that")
    known = [name for name in parallel_families() if name in FAMILIES]
    if base_type(kind) not in known:
        state = model.family.block_of(model.config)
        if state == form:
            raise UsageError(f"--block {form}: {kind}'s blocks are {form} already; leave --block out")
        raise UnsupportedError(
            f"{kind}: its class has {state} blocks only, and Rehead has none of its own for it; "
            f"of the models whose blocks can change there are {', '.join([*SWITCHES, *known])}"
        )
    return _carried(model, form, chosen, plain)


def parallel_now(config: Any) -> set[int]:
    """The layers that are parallel in a config of ours, or none."""
    if base_type(config.model_type) == config.model_type:
        return set()
    given = config.parallel_layers
    return set(range(int(config.num_hidden_layers)) if given is None else given)


def _carried(model: Model, form: str, chosen: list[int], plain: bool) -> Rewrite:
    """The same tensors; the config says which layers are parallel."""
    from rehead.models.modeling import parallel_config

    before = parallel_now(model.config)
    after = before | set(chosen) if form == PARALLEL else before - set(chosen)
    changed = before ^ after
    if not changed:
        raise UsageError(f"--block {form}: the layers asked for are {form} already; leave --block out")
    if after and plain:
        raise UnsupportedError(
            f"{base_type(model.config.model_type)}: transformers' class has serial blocks only, so parallel ones are "
            "not plain; leave --plain out and the checkpoint carries its modelling file"
        )
    raw = parallel_config(copy.deepcopy(model.source.config), sorted(after))
    return _changing(model, unchanged("block", raw, model.family, model.source.tensors), changed)


def _switched(model: Model, form: str, chosen: list[int]) -> Rewrite:
    """By the class's own switch, which all layers share."""
    kind, state = model.config.model_type, model.family.block_of(model.config)
    if state == form:
        raise UsageError(f"--block {form}: {kind}'s blocks are {form} already; leave --block out")
    if len(chosen) != int(model.config.num_hidden_layers):
        raise UnsupportedError(f"{kind}: its class switches all layers together; leave --layers out")
    return _changing(model, SWITCHES[kind](model, form), set(chosen))


def _changing(model: Model, rewrite: Rewrite, layers: set[int]) -> Rewrite:
    config = resolve_config(rewrite.config, model.source.id)
    family = resolve_family(config, model.source.tensors)
    facts = {
        "before": model.family.block_of(model.config),
        "after": family.block_of(config),
        "layers": sorted(layers),
        "plain": "auto_map" not in without_remote_code(rewrite.config),
    }
    return replace(rewrite, exact=False, layers=tuple(sorted(layers)), facts=facts)
