"""Serial and parallel blocks of a live model: the form changed per instance, fused, measured, and taken back."""
