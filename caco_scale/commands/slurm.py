"""Command: ``caco slurm init [DIR]`` writes the job scripts for a SLURM cluster into a folder of the user's own.

There they are as in a checkout: ``slurm/`` beside ``ds_configs/``, from which they take the launcher's configs, so that
both can be edited. Jobs are submitted from that folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from caco_scale import shipped
from caco_scale.atomic import write_atomically
from caco_scale.errors import UserError, exit_on_user_error, quoted
from caco_scale.flags.read import Switch, read_command, shown

PROG = "caco slurm"
ABOUT = "Train on a SLURM cluster by job scripts that resume through time limits, preemptions and lost nodes."
WRITTEN = ("slurm", "ds_configs")


@dataclass(frozen=True, kw_only=True)
class Init:
    """Write the job scripts, and the launcher configs that they use, into a folder of yours."""

    dir: Positional[Annotated[str, shown("DIR")]] = "."
    """Folder in which slurm/ and ds_configs/ are written (default: the current one)."""
    force: Switch = False
    """Overwrite files that are there and differ; slurm/site.sh is never touched."""


COMMANDS = {"init": Init}


def write(directory: Path, force: bool = False) -> int:
    """Write what is not there yet -> how many files that were.

    Raises:
        UserError: files that differ are there, without ``force``: nothing is written then; or the place cannot be
            written to.
    """
    ours = {name: shipped.place(name).read_bytes() for name in shipped.names() if name.startswith(WRITTEN)}
    try:
        there = {name: _content(directory / name) for name in ours}
        differ = [name for name, content in there.items() if content not in (None, ours[name])]
        if differ and not force:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(
                f"{directory} has other files by the names {', '.join(differ[:3])}{more}: give another DIR, or --force "
                "to overwrite them"
            )
        missing = [name for name, content in there.items() if content != ours[name]]
        for name in missing:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, ours[name])
            if ours[name].startswith(b"#!"):
                readable = path.stat().st_mode
                path.chmod(readable | (readable & 0o444) >> 2)
    except OSError as error:
        raise UserError(
            f"cannot write the job scripts to {directory} ({error.filename}: {error.strerror}): give another DIR"
        ) from None
    return len(missing)


def _content(path):
    """A file's bytes, None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def next_steps(directory: Path) -> str:
    """Two lines: what to edit, and what to try first."""
    enter = "" if directory == Path() else f"cd {quoted(directory)} && "
    in_venv = sys.prefix != sys.base_prefix
    environment = f"VENV={quoted(sys.prefix)}" if in_venv else "environment"
    return (
        f"next: {enter}cp slurm/site.sh.example slurm/site.sh, and edit it: partition, account, {environment}, places\n"
        "then: slurm/submit.sh 800ep --self-test, two nodes for five minutes; slurm/README.md says the rest"
    )


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Write the files and say what comes next; exit code 2 where that would lose a file of the user's."""
    _, flags = read_command(COMMANDS, sys.argv[1:] if arguments is None else arguments, prog, ABOUT)
    if "://" in flags.dir:
        raise UserError(f"{flags.dir} is an address: give a folder that the cluster's nodes see")
    directory = Path(flags.dir)
    count = write(directory, flags.force)
    print(f"wrote {count} files to {quoted(directory / 'slurm')} and {quoted(directory / 'ds_configs')}")
    print(next_steps(directory))
