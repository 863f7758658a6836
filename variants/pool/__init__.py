"""Fewer KV heads: multi-head to grouped-query or multi-query attention."""
