"""Re-hosting: the same function under another model type, where a model's own class cannot hold fewer KV heads.

A host is a file with one function that turns a checkpoint's config and headers into a
:class:`~rehead.models.rewrite.Rewrite`: the new config, and for each tensor of the result what it is made of. The
result has a KV head for each query head, and everything downstream works on it as on any other model.
"""

from rehead.convert.hosts.registry import HOSTS, host, hosts_of, window_hosts

__all__ = ["HOSTS", "host", "hosts_of", "window_hosts"]
