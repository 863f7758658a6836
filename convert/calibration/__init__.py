"""Calibration: running a model layer by layer over text, and what is learnt from it."""
