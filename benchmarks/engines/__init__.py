"""Do serving engines give the same tokens as transformers for what Rehead writes? Run, not read.

``make engines`` sets up each engine in an environment of its own, converts a small model of every class that Rehead
writes, lets each engine continue a text greedily, and compares tokens, log-probabilities and cache bytes with
transformers. The result is ``models/serving.json``, which the tables of README and docs and the model cards read.
"""
