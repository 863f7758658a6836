"""Exact tiled attention on the CPU: forward and backward in linear memory, skipping the tiles that a mask rules out."""

from rehead.attention.cpu.operator import attention, run

__all__ = ["attention", "run"]
