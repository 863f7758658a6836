"""Which class may stand in for which, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rehead.checkpoints.safetensors_io import TensorInfo
from rehead.errors import UnsupportedError, UsageError, unknown_name
from rehead.models.families.spec import Config
from rehead.models.families.table import FAMILIES
from rehead.models.rewrite import Builder, Recipe

#: (model type, host) -> the module below this package whose function ``host`` builds the recipe. Hosts of one type in
#: the order in which ``auto`` tries them.
_PAIRS: dict[tuple[str, str], str] = {
    ("gpt_neox", "phi"): "phi",
    ("gpt_neox", "starcoder2"): "starcoder2",
    ("gpt_neox", "nemotron"): "nemotron",
    ("gptj", "phi"): "phi",
    ("codegen", "phi"): "phi",
    ("gpt2", "gpt_bigcode"): "gpt_bigcode",
    ("gpt_neo", "gpt_bigcode"): "gpt_bigcode",
    ("opt", "gpt_bigcode"): "gpt_bigcode",
    ("biogpt", "gpt_bigcode"): "gpt_bigcode",
    ("xglm", "gpt_bigcode"): "gpt_bigcode",
}

#: Every host that ``--host`` may name.
HOSTS = tuple(dict.fromkeys(host for _, host in _PAIRS))


def hosts_of(model_type: str) -> list[str]:
    """The classes that may stand in for a model type's own, the preferred one first."""
    return [host for source, host in _PAIRS if source == model_type]


def find_host(name: str, config: Config, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Recipe:
    """Plan the re-hosting of a checkpoint; no weight is read.

    Args:
        name: a host, or ``"auto"`` for the first that computes the same function.
        config: the checkpoint's resolved config; raw: its ``config.json``.
        tensors: headers of its tensors by name.

    Raises:
        UsageError: no such host.
        UnsupportedError: that host cannot stand in for this model, or not without changing the function.
    """
    model_type = config.model_type
    candidates = hosts_of(model_type)
    if name != "auto" and name not in HOSTS:
        raise UsageError(unknown_name("host", name, ["auto", *HOSTS]))
    if not candidates:
        native = model_type in FAMILIES
        raise UnsupportedError(
            f"{model_type}: "
            + (
                "its own class holds fewer KV heads; leave --host out"
                if native
                else f"no other class can stand in for its own; of these one can: {', '.join(hosted_types())}"
            )
        )
    if name != "auto":
        if name not in candidates:
            raise UnsupportedError(
                f"{model_type}: {name} cannot stand in for it; use --host {candidates[0]} or --host auto"
            )
        candidates = [name]
    refusals = []
    for host in candidates:
        build: Callable[[Builder], Recipe] = import_module(f"rehead.convert.hosts.{_PAIRS[model_type, host]}").host
        try:
            return build(Builder(FAMILIES[model_type], FAMILIES[host], config, raw, tensors))
        except UnsupportedError as refusal:
            refusals.append((host, str(refusal).removeprefix(f"{model_type}: ")))
    if len(refusals) == 1:
        raise UnsupportedError(f"{model_type}: {refusals[0][1]}")
    raise UnsupportedError(f"{model_type}: " + "; ".join(f"as {host}: {reason}" for host, reason in refusals))


def hosted_types() -> list[str]:
    """Model types that have a host."""
    return list(dict.fromkeys(source for source, _ in _PAIRS))
