"""Pooling methods: how the KV heads of a group become one."""

from rehead.variants.pool.methods.registry import Method, MethodContext, get_method, method_names, register

__all__ = ["Method", "MethodContext", "get_method", "method_names", "register"]
