"""Measurements side by side in one run, as ratios: ``python -m caco_scale.benchmark``.

This room may import every other, and ``data_prep`` for its shard sets; none imports it but by the command's name. A
benchmark is a file with ``measure(...)``, which gives figures and notes; ``measure.py`` runs its contenders in turn.
"""
