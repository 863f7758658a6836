"""A folder in, a folder out: reading checkpoints from disk or the Hub, and writing them whole or not at all."""
