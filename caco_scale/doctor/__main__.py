"""Command: ``python -m caco_scale.doctor [RECIPE] [--flags]``; see :mod:`caco_scale.doctor.checks`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from caco_scale.errors import exit_on_user_error, run_command
from caco_scale.flags.read import shown
from caco_scale.flags.rules import Rule

PROG = "python -m caco_scale.doctor"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Check machine, launch, configuration, data and storage before a run, and say what to fix."""

    takes_recipe: ClassVar[bool] = True

    processes: Annotated[int | None, Rule(lambda x: x >= 1, "give at least 1"), shown("N")] = None
    """Processes of a launch to come, which one process answers for (default: this launch is checked)."""
    strategy: str = "ddp"
    """Their strategy: the name of a launcher config, as caco path lists them (zero2)."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print the findings; exit code 1 if any of them is a failure, 2 on a typo."""
    from caco_scale.config import parse

    config, plan = parse(sys.argv[1:] if arguments is None else arguments, prog, Plan)
    from caco_scale.doctor.checks import everywhere, examine, look_first

    speaks = not int(os.environ.get("RANK", 0))
    first = look_first(config)
    for finding in first if speaks else ():
        print(f"{finding.status:5}{finding.text}", flush=True)
    found = everywhere(examine(config, (plan.strategy, plan.processes) if plan.processes else None))
    findings = [finding for finding in found if finding not in first]
    failures = sum(f.status == "FAIL" for f in [*first, *findings])
    if not speaks:
        sys.exit(0)  # rank 0 answers for all; a failure here would have it ended before it speaks
    for finding in findings:
        print(f"{finding.status:5}{finding.text}")
    verdict = f"{failures} finding(s) to fix" if failures else "ready"
    print(f"{config.recipe}: {verdict}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run_command(main)
