"""The table of all commands: where each is, what it does, and which flags it has.

It knows a command by the name of its module alone, and imports a module when its flags are asked for. A command's
module has ``main(arguments, prog)``, and its flags as a dataclass; those of a group are in its ``COMMANDS``.
"""

import importlib
from typing import Any, NamedTuple

from caco_scale.flags.read import summary


class Command(NamedTuple):
    """Where a command is, what it does in one line, and the name of its flags' dataclass."""

    module: str
    about: str
    flags: str = ""


COMMANDS = {
    "pretrain": Command("caco_scale.pretrain", "Train an image encoder by a recipe; without one, the demo."),
    "sweep": Command("caco_scale.sweep.__main__", "Many runs by one file, and a table of them.", "Sweep"),
    "shards": Command("data_prep.__main__", "Shard sets of images."),
    "evaluate": Command("caco_scale.evaluate.__main__", "How good a backbone is."),
    "embed": Command("caco_scale.embed.__main__", "Features of a set in a file; neighbours, duplicates."),
    "export": Command("caco_scale.export.__main__", "A backbone as a file for other programs.", "Export"),
    "report": Command("caco_scale.report.__main__", "A run, or several, as one HTML page.", "Report"),
    "runs": Command(
        "caco_scale.report.overview", "A table of all runs in a folder; also as CSV and a page.", "Runs"
    ),
    "doctor": Command(
        "caco_scale.doctor.__main__", "Check everything before a run, and say the fix.", "Plan"
    ),
    "estimate": Command("caco_scale.doctor.estimate", "Steps, hours and price of a run.", "Estimate"),
    "preflight": Command("caco_scale.doctor.preflight", "Check the nodes of a job.", "Preflight"),
    "benchmark": Command("caco_scale.benchmark.__main__", "Measure against straightforward peers."),
    "path": Command(
        "caco_scale.commands.path", "Where a file is that comes with it: launcher configs, recipes.", "Named"
    ),
    "slurm": Command("caco_scale.commands.slurm", "Job scripts for a SLURM cluster."),
    "completion": Command(
        "caco_scale.commands.completion", "Print what makes a shell complete these.", "Completion"
    ),
}


def group(name: str) -> dict[str, type[Any]]:
    """The commands of a group, name -> dataclass; empty for a command that is none."""
    if name == "pretrain" or COMMANDS[name].flags:
        return {}
    return importlib.import_module(COMMANDS[name].module).COMMANDS


def every_command() -> dict[str, str]:
    """``{"evaluate knn": what it does in one line}`` of all commands, groups written out."""
    found = {}
    for name, command in COMMANDS.items():
        parts = group(name)
        found |= {f"{name} {part}": summary(kind) for part, kind in parts.items()} or {name: command.about}
    return found
