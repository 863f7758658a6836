"""What a checkpoint's model is: its architecture as data, its heads, and the live model behind it."""
