"""Command: ``python -m caco_scale.doctor [RECIPE] [--flags]``; see :mod:`caco_scale.doctor.checks`."""

from caco_scale.doctor.checks import main
from caco_scale.errors import run_command

if __name__ == "__main__":
    run_command(main)
