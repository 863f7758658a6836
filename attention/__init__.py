"""Exact attention in tiles: the rules of one call, masks, kernels, and the link to transformers."""
