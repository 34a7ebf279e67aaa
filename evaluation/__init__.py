"""Measuring a trained model (``--mode test``). Each metric is a module of this package with a function ``measure``."""

METRICS = ("classification", "calibration", "ood", "robustness", "quality", "likelihood")
