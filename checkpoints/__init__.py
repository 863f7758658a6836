"""Read checkpoints from disk or the Hub, and write them completely or not at all."""
