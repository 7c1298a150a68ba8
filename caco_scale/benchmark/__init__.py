"""Measurements side by side in one run, as ratios: ``python -m caco_scale.benchmark``."""
