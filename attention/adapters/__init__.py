"""Adapters make attention modules that compute their own scores call the tiled attention instead.

An adapter is a function of one module that returns the instance attributes to set on it (usually ``forward`` or an
inner method). It is registered for exact classes by qualified name, so that no transformers module is imported for it.
"""

from rehead.attention.adapters import alibi, encoder_decoder, inner, latent
from rehead.attention.adapters.registry import ADAPTERS, Adapter, adapt, adapter_for, qualified, register_adapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "adapt",
    "adapter_for",
    "alibi",
    "encoder_decoder",
    "inner",
    "latent",
    "qualified",
    "register_adapter",
]
