"""Pooling methods: how the KV heads of a group become one."""

from rehead.variants.pool.methods.registry import METHODS, Method, MethodContext, register

__all__ = ["METHODS", "Method", "MethodContext", "register"]
