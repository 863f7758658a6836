"""Reinvesting: what shared KV heads free goes into a wider model, which computes what the narrow one did.

ChatGLM2 spent it on its FFN (4096 channels, one KV head of 128 in place of 32: 11008 became 13696), Falcon on its
hidden size (4096 became 4544). :mod:`~rehead.convert.reinvest.arithmetic` gives both figures. New FFN channels enter
with zero output weights, new hidden channels are written by nobody, and what reads either is drawn at random, so that
it can train.
"""

from rehead.convert.reinvest.widening import widen

__all__ = ["widen"]
