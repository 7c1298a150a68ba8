"""The one command, ``caco`` (and ``python -m caco_scale``): it lists all commands and runs them; none imports it."""

import importlib
import sys
from collections.abc import Sequence

from caco_scale.commands.table import COMMANDS, every_command
from caco_scale.errors import exit_on_user_error, run_command
from caco_scale.flags.read import pick

ABOUT = "CaCo: self-supervised pre-training of image encoders at cluster scale (arXiv:2203.14370)."


@exit_on_user_error
def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the first word names; no word, or ``--help``, lists all."""
    names = {name: command.about for name, command in COMMANDS.items()}
    name, rest = pick(names, arguments or ["--help"], "caco", ABOUT, every_command)
    importlib.import_module(COMMANDS[name].module).main(rest, f"caco {name}")


def main() -> None:
    """The program: its good end is the process's."""
    run_command(lambda: dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()
