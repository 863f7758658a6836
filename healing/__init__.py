"""Recovery on calibration text: run a model layer by layer, gather what it sees, refit and fit the changed layer."""
