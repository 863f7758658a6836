"""Exact attention in tiles: the rules of one call, masks, kernels, and the way in from transformers."""
