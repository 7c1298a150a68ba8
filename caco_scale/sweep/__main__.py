"""Command: ``python -m caco_scale.sweep STUDY.yaml [--section.field value ...]``; see :mod:`caco_scale.sweep`."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from rich.console import Console

from caco_scale import config as configuration
from caco_scale.atomic import write_atomically
from caco_scale.config import Config
from caco_scale.errors import UserError, exit_on_user_error, one_line, run_command
from caco_scale.flags.read import Switch, read_both, shown, take_word
from caco_scale.flags.rules import PositiveInt
from caco_scale.sweep.runs import complaint, read_result, refuse_other_values
from caco_scale.sweep.study import OWN, Planned, Study, read_study
from caco_scale.sweep.table import Entry, lines, to_csv, to_rich
from caco_scale.training.places import look_early

PROG = "python -m caco_scale.sweep"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train every run of a study, some at a time, and make one table of what they reached."""

    takes_flags: ClassVar[bool] = True  # of the recipe, for all runs

    dir: Annotated[str, shown("DIR")] = ""
    """Folder of the runs and of their table (default: runs/<the study's name>)."""
    jobs: PositiveInt = 1
    """Runs at a time."""
    devices: Annotated[tuple[str, ...], shown("N ...")] = ()
    """CUDA devices that the jobs share out (default: all see what the environment says)."""
    dry_run: Switch = False
    """Check everything, print each run's command, and train nothing."""


def read_arguments(arguments: Sequence[str], prog: str = PROG) -> tuple[Study, Sweep]:
    """``STUDY.yaml [--flag value ...]``; a recipe's flags here are for all runs.

    Raises:
        UserError: as :func:`read_study`; a typo; a flag that the study varies or the sweep sets.
    """
    path, arguments = take_word(list(arguments), [Sweep, Config])
    study = read_study(path) if path else None
    base = study.base if study else Config()
    about = (
        f"{Sweep.__doc__} STUDY.yaml: recipe, flags, runs, grid, seeds. The other flags are for all its runs."
    )
    config, options = read_both(Config, Sweep, arguments, prog, default=base, about=about, usage="STUDY.yaml")
    if study is None:
        raise UserError(f"give STUDY.yaml, the file of a study: {prog} --help says more")
    before, now = configuration.flatten(base), configuration.flatten(config)
    for field in [field for field in now if now[field] != before[field]]:
        if field in OWN:
            raise UserError(f"--{field} is set by the sweep: use {OWN[field]}")
        if field in study.varied_fields():
            raise UserError(
                f"--{field}: the runs of {study.path} have values of their own: change them there"
            )
    return Study(study.path, study.recipe, config, study.variants, study.seeds), options


def check(plan: Sequence[Planned]) -> None:
    """Refuse what would fail later: whatever the trainer refuses at a start, for every run that is not done.

    Raises:
        UserError: the first such thing, with the run's name.
    """
    for planned in plan:
        with _named(planned):
            look_early(planned.config)
    import torch

    from caco_scale.training.assemble import resolve_precision
    from caco_scale.training.checks import BEFORE_DATA, OF_DATA, Start, check_room, refuse_to_start
    from caco_scale.training.fit import fit_to_set

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for planned in plan:
        with _named(planned):
            config, _ = fit_to_set(resolve_precision(planned.config, device)[0])
            start = Start(config, "ddp", 0, 1, device)
            refuse_to_start(start, (*BEFORE_DATA, *OF_DATA, check_room))


@contextlib.contextmanager
def _named(planned):
    """A mistake within it is said with the run's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{planned.name}: {error}") from None


def train(entries: Sequence[Entry], folder: Path, options: Sweep, save: Callable[[], object]) -> None:
    """Train what is not done; ``save`` is called whenever an entry has changed. Every entry says how it ended."""
    from caco_scale.sweep.runner import Runner, alone_in

    by_directory = {entry.planned.directory: entry for entry in entries}

    def finished(planned, code):
        entry = by_directory[planned.directory]
        entry.result, entry.state = read_result(planned), "done"
        if entry.result.done is None:
            entry.state = "stopped" if code == 0 else f"failed: {complaint(planned.directory)}"
        knn = "" if entry.result.final is None else f", kNN {entry.result.final:.2f}%"
        print(f"{planned.name}, seed {planned.seed}: {entry.state}{knn}", flush=True)
        save()

    with alone_in(folder) as lock:
        for entry in entries:  # another sweep may have been at work meanwhile
            entry.result = read_result(entry.planned)
            entry.state = "to do" if entry.result.done is None else "done"
        save()
        waiting = [entry.planned for entry in entries if entry.state == "to do"]
        print(f"{folder}: {len(entries) - len(waiting)} of {len(entries)} runs are done", flush=True)
        Runner(options.jobs, options.devices, lock, finished).run(waiting)


def write_table(path: Path, entries: Sequence[Entry], fields: Sequence[str]) -> None:
    """The table as it stands, as a CSV file. Raises UserError where it cannot be written."""
    try:
        write_atomically(path, to_csv(lines(entries), fields).encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free or fix that place, and start again"
        ) from None


def compare(entries: Sequence[Entry], folder: Path) -> None:
    """One page of the best runs' curves, as many as can be told apart; a page that cannot be is a line of output."""
    from caco_scale.report.__main__ import write_report
    from caco_scale.report.runs import MAX_RUNS

    done = [entry for entry in entries if entry.state == "done"]
    done.sort(key=lambda entry: -(entry.result.final or 0))
    if len(done) > 1:
        try:
            page = write_report(
                [e.planned.directory for e in done[:MAX_RUNS]], folder / "report.html", images=0
            )
            print(f"curves of the best {min(len(done), MAX_RUNS)}: {page}", flush=True)
        except UserError as error:
            print(f"no page: {one_line(error)}", flush=True)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Train and print the table; exit code 0 when every run is done, 1 when one is not, 2 on a user's mistake."""
    study, options = read_arguments(sys.argv[1:] if arguments is None else arguments, prog)
    folder = Path(options.dir or f"runs/{study.path.stem}")
    plan = study.planned(folder)
    for planned in plan:
        refuse_other_values(planned)
    entries = [Entry(planned, read_result(planned)) for planned in plan]
    check([entry.planned for entry in entries if entry.result.done is None])
    if options.dry_run:
        for planned in plan:
            print(shlex.join(["python", "-m", "caco_scale.pretrain", *planned.command()]))
        return
    table = folder / "table.csv"
    train(entries, folder, options, lambda: write_table(table, entries, study.varied_fields()))
    compare(entries, folder)
    Console(width=None if sys.stdout.isatty() else 160).print(to_rich(lines(entries), str(study.path)))
    print(f"wrote {table}", flush=True)
    if any(entry.state != "done" for entry in entries):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
