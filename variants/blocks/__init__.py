"""Serial and parallel blocks: the form changed in a live model or a checkpoint, measured, and taken back."""
