"""The report: one self-contained HTML page about a run, or several side by side. ``python -m caco_scale.report``."""
