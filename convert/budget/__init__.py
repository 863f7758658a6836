"""One budget for the cache: which form each layer takes, so that the whole loses least."""
