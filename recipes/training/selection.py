"""Which parameters train, and at which rates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from rehead.errors import UsageError, unknown_name

#: What the words of ``--train`` mean, as regular expressions on parameter names.
PARTS = {
    "all": r"",
    "attention": r"(^|\.)((self_|linear_)?attn|(self_|linear_)?attention|self_attn\w*|attn\w*)\."
    r"|\.(mixer|temporal_block)\.[qkvo]_proj\.",
    "mlp": r"(^|\.)(mlp|mlp_block|shared_mlp|ffn|feed_forward|block_sparse_moe|experts|shared_expert\w*|fc1|fc2)\.",
    "norms": r"(norm\w*|ln_\w+|layernorm\w*)\.(weight|bias)$",
    "embeddings": r"(^|\.)(embed_\w+|wte|wpe|word_embeddings|embeddings|lm_head)\.",
}


def choose(model: nn.Module, train: str) -> list[str]:
    """Let the chosen parameters train and freeze the others.

    Args:
        model: changed in place (``requires_grad``).
        train: words of :data:`PARTS` or regular expressions, joined by commas; a parameter that any of them finds
            trains.

    Returns:
        The names of what trains.

    Raises:
        UsageError: one of them finds nothing.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    chosen: set[str] = set()
    for part in (part.strip() for part in train.split(",")):
        found = {name for name in names if re.search(PARTS.get(part, part), name)}
        if not found:
            known = f"; {unknown_name('part', part, PARTS)}" if part.isalpha() and part not in PARTS else ""
            raise UsageError(f"--train {part}: no parameter of {type(model).__name__} is called so{known}")
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def parameter_groups(
    trained: Mapping[str, Any], learning_rate: float, factors: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: one for each learning rate and weight decay.

    Args:
        trained: tensors by parameter name.
        learning_rate: peak rate.
        factors: by regular expression on names; the first that finds a name counts.
        weight_decay: of matrices; vectors (norms, biases) have none.

    Returns:
        Dicts with ``params``, ``names``, ``lr``, ``peak`` (the same, kept) and ``weight_decay``.

    Raises:
        UsageError: an expression finds no parameter that trains.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, tensor in trained.items():
        pattern = next((pattern for pattern in factors if re.search(pattern, name)), None)
        factor = 1.0 if pattern is None else factors[pattern]
        if pattern is not None:
            used.add(pattern)
        rate, decay = learning_rate * factor, weight_decay if tensor.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "peak": rate})
        group["weight_decay"] = decay
        group["params"].append(tensor)
        group["names"].append(name)
    idle = [pattern for pattern in factors if pattern not in used]
    if idle:
        raise UsageError(f"--lr-for {idle[0]}: no parameter that trains is called so; check the name or --train")
    return list(groups.values())
