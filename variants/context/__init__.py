"""A longer context by other rotary frequencies: what a config can say, in a checkpoint and on a live model."""
