"""Re-hosting: the same function under another model type, where a model's own class cannot hold fewer KV heads.

A host is a file with one function that turns a checkpoint's config and headers into a :class:`Recipe`: the new config,
and for each tensor of the result what it is made of. No weight is read until the result is; :class:`HostedSource` shows
the checkpoint as its host's class sees it, with a KV head for each query head, and everything downstream (plan,
calibration, pooling) works on it as on any other source.
"""

from rehead.convert.hosts.registry import find_host, hosts_of
from rehead.models.rewrite import Derived, Recipe
from rehead.models.rewritten import HostedSource

__all__ = ["Derived", "HostedSource", "Recipe", "find_host", "hosts_of"]
