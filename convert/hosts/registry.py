"""Which class may stand in for which, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from rehead.errors import UnsupportedError, UsageError, unknown_name
from rehead.models.families.parallel import FILE
from rehead.models.families.table import FAMILIES
from rehead.models.model import Model
from rehead.models.rewrite import Builder, Rewrite

#: (model type, host) -> the module below this package whose function ``host`` builds the Rewrite. Hosts of one type in
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
#: The same for classes that give single layers a window; ``auto`` does not try them, variants ask for them.
_WINDOWED: dict[tuple[str, str], str] = {
    (source, host): "windowed"
    for source in ("llama", "mistral", "ministral", "qwen2")
    for host in ("ministral", "qwen2", "cwm", "smollm3", "granite_swa")
    if source != host
}

#: Every host that ``--host`` may name; the last is a model's own class with Rehead's modelling file for windows.
HOSTS = (*dict.fromkeys(host for _, host in (*_PAIRS, *_WINDOWED)), FILE)


def hosts_of(model_type: str) -> list[str]:
    """The classes that may stand in for a model type's own, the preferred one first."""
    return [host for source, host in _PAIRS if source == model_type]


def window_hosts(model: Model) -> list[str]:
    """The classes with a window for each layer that can stand in for a model's own."""
    named = [host for source, host in _WINDOWED if source == model.config.model_type]

    def fits(name: str) -> bool:
        try:
            host(model, name)
        except UnsupportedError:
            return False
        return True

    return [name for name in named if fits(name)]


def host(model: Model, name: str = "auto", logits: bool = False) -> Rewrite:
    """A model under the class that stands in for its own, with a KV head for each query head; no weight is read.

    Args:
        name: a host, or ``"auto"`` for the first that computes the same function.
        logits: of Rehead's modelling file for windows: give each head a sink logit, switched off.

    Raises:
        UsageError: no such host.
        UnsupportedError: that host cannot stand in for this model, or not without changing the function.
    """
    model_type, source = model.config.model_type, model.source
    if name == FILE:
        from rehead.variants.window.classes import with_file

        return with_file(model, logits)
    candidates, pairs = hosts_of(model_type), _PAIRS | _WINDOWED
    if (model_type, name) in _WINDOWED:
        candidates = [name]
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
    for candidate in candidates:
        module = import_module(f"rehead.convert.hosts.{pairs[model_type, candidate]}")
        build: Callable[[Builder], Rewrite] = module.host
        try:
            rewrite = build(
                Builder(FAMILIES[model_type], FAMILIES[candidate], model.config, source.config, source.tensors)
            )
            return replace(rewrite, facts={"before": model_type, "after": candidate, **rewrite.facts})
        except UnsupportedError as refusal:
            refusals.append((candidate, str(refusal).removeprefix(f"{model_type}: ")))
    if len(refusals) == 1:
        raise UnsupportedError(f"{model_type}: {refusals[0][1]}")
    raise UnsupportedError(f"{model_type}: " + "; ".join(f"as {candidate}: {reason}" for candidate, reason in refusals))


def hosted_types() -> list[str]:
    """Model types that have a host."""
    return list(dict.fromkeys(source for source, _ in _PAIRS))
