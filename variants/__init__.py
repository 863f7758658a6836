"""The forms of attention and of blocks that a model can be given, one folder each."""
