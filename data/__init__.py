"""Text in, rows of tokens out: where documents come from, how they are packed, and in which order they are seen."""
