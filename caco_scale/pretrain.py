"""Command: ``accelerate launch -m caco_scale.pretrain [RECIPE] [--section.field value ...]``.

Only what must happen before torch is imported stands here: the signal handlers, the flags, and a look at the places
that they name, so that a mistake is answered at once. Loader workers import this module too, so it imports nothing
heavy at its top.
"""

import sys
from collections.abc import Sequence

from caco_scale.errors import exit_on_user_error, run_command

PROG = "python -m caco_scale.pretrain"


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Train by recipe and flags; exit code 0 when finished or stopped by a signal, 2 on a user's mistake."""
    from caco_scale.run.signals import Signals

    signals = Signals().install()

    from caco_scale.config import parse

    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(arguments, prog)

    from caco_scale.run.command import started_as

    command = started_as(prog, arguments)  # now: the launcher may be gone at the end

    from caco_scale.training.places import look_early

    with signals.ending_at_once():
        look_early(config)

    from caco_scale.training.trainer import run

    outcome = run(config, signals)

    from caco_scale.api.finish import finish

    finish(outcome, command, signals)
    signals.retire()


if __name__ == "__main__":
    run_command(main)
