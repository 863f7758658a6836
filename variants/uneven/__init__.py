"""Head groups of unequal size, and a number of KV heads for each layer."""
