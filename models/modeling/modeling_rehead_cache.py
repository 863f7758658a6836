"""What transformers calls the cache of keys and values: ``cache`` since 5.24, ``past_key_values`` before.

It is an argument of every model, of its layers and of ``generate``, and a field of what they return; 5.24 still takes
the old name, with a warning. Rehead passes and reads every cache through this file, which travels beside a checkpoint
that needs it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

NEW, OLD = "cache", "past_key_values"
NAME = NEW if NEW in CausalLMOutputWithPast.__dataclass_fields__ else OLD
"""The name that the installed transformers gives the cache."""
NAMES = (NEW, OLD, "layer_past")
"""Every name under which a module may be handed a cache; the layers of some ALiBi models call it ``layer_past``."""


def cache_argument(cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand ``cache`` to a model or to ``generate``; none for None."""
    return {} if cache is None else {NAME: cache}


def passed_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, under whichever name; None without one."""
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def returned_cache(output: Any) -> Any:
    """The cache that a model gave back beside its logits; None where it keeps none."""
    return getattr(output, NAME, None)


def either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a layer's ``forward``, which has an argument ``cache``, be called with the old name too."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if OLD in kwargs:
            kwargs[NEW] = kwargs.pop(OLD)
        return forward(*args, **kwargs)

    return renamed
