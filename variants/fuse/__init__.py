"""Blocks computed with fewer, larger matrix products; the same function."""
