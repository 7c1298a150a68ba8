"""Command: ``python -m caco_scale.doctor [RECIPE] [--flags]``; see :mod:`caco_scale.doctor.checks`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from caco_scale.errors import exit_on_user_error, run_command
from caco_scale.flags.read import shown
from caco_scale.flags.rules import ABOVE_0, Rule

PROG = "python -m caco_scale.doctor"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Check machine, launch, configuration, data and storage before a run, and say what to fix."""

    takes_recipe: ClassVar[bool] = True

    processes: Annotated[int | None, Rule(lambda x: x >= 1, "give at least 1"), shown("N")] = None
    """Processes of a launch to come, which one process answers for (default: this launch is checked)."""
    strategy: str = "ddp"
    """Their strategy: the name of a launcher config, as caco path lists them (zero2)."""
    gpu_gb: Annotated[float | None, ABOVE_0, shown("GB")] = None
    """Memory of a GPU that they will have (default: that of this machine's)."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print the findings; exit code 1 if any of them is a warning or a failure, 2 on a typo."""
    from caco_scale.config import parse

    config, plan = parse(sys.argv[1:] if arguments is None else arguments, prog, Plan)
    from caco_scale.doctor.checks import Planned, everywhere, examine, look_first

    speaks = not int(os.environ.get("RANK", 0))
    first = look_first(config)
    for finding in first if speaks else ():
        print(f"{finding.status:5}{finding.text}", flush=True)
    planned = plan.processes or (1 if plan.gpu_gb else None)
    launch = Planned(plan.strategy, planned, plan.gpu_gb) if planned else None
    found = everywhere(examine(config, launch))
    findings = [finding for finding in found if finding not in first]
    statuses = [finding.status for finding in [*first, *findings]]
    failures, warnings = statuses.count("FAIL"), statuses.count("warn")
    if not speaks:
        sys.exit(0)  # rank 0 answers for all; a failure here would have it ended before it speaks
    for finding in findings:
        print(f"{finding.status:5}{finding.text}")
    verdict = "ready"
    if failures:
        verdict = f"{failures} finding(s) to fix" + (f", {warnings} warning(s)" if warnings else "")
    elif warnings:
        verdict = f"it would train, with {warnings} warning(s)"
    print(f"{config.recipe}: {verdict}", flush=True)
    sys.exit(1 if failures or warnings else 0)


if __name__ == "__main__":
    run_command(main)
