"""Command: ``caco runs DIR``: a line for every run below a folder, as a table, a CSV file and a page.

    python -m caco_scale.report.overview DIR [--sort best] [--csv FILE] [--page FILE]

Of a run only little is read, so that hundreds are listed at once: a few lines of its configuration, its markers, the
figures of its newest checkpoint, and of ``metrics.jsonl`` what was written since. It changes nothing in a run's
directory, and neither torch nor numpy is loaded.
"""

import csv
import io
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import Positional

from caco_scale.atomic import write_atomically
from caco_scale.checkpoint.folder import VALUES, latest
from caco_scale.errors import UserError, exit_on_user_error
from caco_scale.flags.read import read, shown
from caco_scale.run.files import check_target, json_lines_backwards
from caco_scale.run.lock import is_held
from caco_scale.run.scores import is_percent

PROG = "python -m caco_scale.report.overview"
DEEPEST = 6  # folders below DIR in which a run is looked for
SETTINGS = ("recipe", "optim.epochs", "bank.rule", "bank.warmup_epochs", "model.arch")
RECENT_LINES = 20  # of whose images per second the median is shown
MOST_VALUES_BYTES = 1 << 22
STATES = ("running", "finished", "stopped", "failed")


@dataclass(frozen=True)
class Row:
    """One run. What is not known is None.

    ``epoch`` of ``epochs``: data epochs, the bank warm-up among them. ``best_knn``, ``last_knn``: top-1 in percent
    after training steps; ``untrained_knn``: before the first. ``images_per_second``: of all processes, the median of
    the last lines. ``updated``: when its metrics have grown.
    """

    run: str
    state: str
    recipe: str | None = None
    rule: str | None = None
    arch: str | None = None
    step: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    best_knn: float | None = None
    best_step: int | None = None
    last_knn: float | None = None
    last_step: int | None = None
    untrained_knn: float | None = None
    images_per_second: float | None = None
    updated: str | None = None


def find_runs(folder: str | Path) -> list[Path]:
    """The run directories in a folder, or itself; nothing within a run is looked at.

    Raises:
        UserError: no folder, none that can be read, or no run in it.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise UserError(f"{folder} {what}: give a folder with runs in it, such as runs")
    found = sorted(_runs_in(folder, 0))
    if not found:
        raise UserError(f"no run in {folder}: the directory of a run has a config.yaml and a metrics.jsonl")
    return found


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except OSError as error:
        if depth:
            return
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    if "config.yaml" in inside and {"attempts.jsonl", "metrics.jsonl", "checkpoints"} & inside.keys():
        yield folder
    elif depth < DEEPEST:
        for name, is_folder in inside.items():
            if is_folder and not name.startswith("."):
                yield from _runs_in(folder / name, depth + 1)


def read_row(path: Path, name: str) -> Row:
    """The :class:`Row` of a run's directory; what is damaged counts as not known."""
    settings, values = _settings(path / "config.yaml"), _values(path)
    metrics = path / "metrics.jsonl"
    saved = values.get("step") or 0
    knn = {step: value for step, value in values.get("knn") or [] if is_percent(value)}
    newest, speeds = {}, []
    try:
        for record in json_lines_backwards(metrics):
            step = record.get("step")
            if not isinstance(step, int):
                continue
            if step < saved and len(speeds) >= min(RECENT_LINES, 1 + bool(newest)):
                break  # the checkpoint knows what stands before
            if is_percent(record.get("knn_top1")):
                knn.setdefault(step, record["knn_top1"])
            if "loss" in record:
                newest = newest or record
                speeds += [record["images_per_second"]] if record.get("images_per_second") else []
        updated = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M")
    except OSError:
        updated = None
    step = newest.get("step") or values.get("step")
    epoch = newest.get("epoch") if newest else values.get("epoch")
    trained = {at: value for at, value in knn.items() if isinstance(at, int) and at > 0}
    best = max(trained, key=lambda at: (trained[at], -at), default=None)
    return Row(
        run=name,
        state=_state(path),
        recipe=settings.get("recipe"),
        rule=settings.get("bank.rule"),
        arch=settings.get("model.arch"),
        step=step,
        epoch=epoch,
        epochs=_epochs(settings, values, step, epoch),
        best_knn=trained.get(best),
        best_step=best,
        last_knn=trained[max(trained)] if trained else None,
        last_step=max(trained, default=None),
        untrained_knn=knn.get(0),
        images_per_second=statistics.median(speeds[:RECENT_LINES]) if speeds else None,
        updated=updated,
    )


def _settings(path: Path) -> dict[str, Any]:
    """The fields of ``SETTINGS`` of a configuration that a run has written, a field a line; no more of it is parsed."""
    kept, section = [], ""
    try:
        for line in path.read_text()[: 1 << 16].splitlines():
            name = line.split(":")[0]
            if not line.startswith(" "):
                section = "" if line.rstrip() != f"{name}:" else f"{name}."
            if f"{section if line.startswith(' ') else ''}{name.strip()}" in SETTINGS:
                kept.append(f"{section if line.startswith(' ') else ''}{line.strip()}")
        found = yaml.safe_load("\n".join(kept))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _values(path: Path) -> dict[str, Any]:
    """What the newest complete checkpoint says of the run, or nothing."""
    try:
        newest = latest(path / "checkpoints")
        if newest is None or (newest / VALUES).stat().st_size > MOST_VALUES_BYTES:
            return {}
        values = json.loads((newest / VALUES).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else {}


def _state(path: Path) -> str:
    """One of ``STATES``; failed is a run that left no marker: it was killed, or ended by an error."""
    if is_held(path / ".lock"):
        return "running"
    markers = {"DONE": "finished", "INTERRUPTED": "stopped"}
    return next((state for name, state in markers.items() if (path / name).exists()), "failed")


def _epochs(settings, values, step, epoch):
    """Data epochs of the whole run: by its last step, where a checkpoint says it, else by the configuration."""
    if values.get("end") and step and epoch:
        return round(values["end"] * epoch / step, 2)
    parts = [settings.get(name) for name in ("optim.epochs", "bank.warmup_epochs")]
    return sum(parts) if all(isinstance(part, int) for part in parts) else None


Sort = Literal["run", "state", "recipe", "rule", "epochs", "best", "last", "speed", "updated"]
ASCENDING = {"run": "run", "recipe": "recipe", "rule": "rule"}
DESCENDING = {"epochs": "epoch", "best": "best_knn", "last": "last_knn", "speed": "images_per_second"}


def in_order(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows sorted: names ascending, figures and times from the greatest, what has none last."""
    rows = sorted(rows, key=lambda row: row.run)
    if by == "state":
        return sorted(rows, key=lambda row: STATES.index(row.state))
    name = ASCENDING.get(by) or DESCENDING.get(by, "updated")
    known = [row for row in rows if getattr(row, name) is not None]
    unknown = [row for row in rows if getattr(row, name) is None]
    return [*sorted(known, key=lambda row: getattr(row, name), reverse=by not in ASCENDING), *unknown]


COLUMNS = (  # title, whether a figure, text of a row
    ("run", False, lambda row: row.run),
    ("state", False, lambda row: row.state),
    ("recipe", False, lambda row: row.recipe or "—"),
    ("rule", False, lambda row: row.rule or "—"),
    ("epochs", True, lambda row: f"{_number(row.epoch, '.4g')} / {_number(row.epochs, '.4g')}"),
    ("best kNN", True, lambda row: _score(row.best_knn, row.best_step)),
    ("last kNN", True, lambda row: _score(row.last_knn, row.last_step)),
    ("untrained", True, lambda row: _score(row.untrained_knn)),
    ("images/s", True, lambda row: _number(row.images_per_second, ",.0f")),
    ("updated (UTC)", False, lambda row: row.updated or "—"),
)


def _number(value, form):
    return "—" if value is None else f"{value:{form}}"


def _score(value, step=None):
    return "—" if value is None else f"{value:.2f}%" + (f" at {step:,}" if step else "")


def print_table(rows: Sequence[Row], title: str) -> None:
    """The table on the console; a pipe gets whole names."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name, is_figure, _ in COLUMNS:
        table.add_column(name, justify="right" if is_figure else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text(row)) for _, _, text in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def to_csv(rows: Sequence[Row]) -> str:
    """All that is known, a column a figure; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def to_page(rows: Sequence[Row], title: str) -> bytes:
    """The table as one HTML page in the report's style, which needs no network and is sorted by a click."""
    from caco_scale.report.templates import render

    return render(
        "report/overview.html",
        title=title,
        counts=[(state, sum(row.state == state for row in rows)) for state in STATES],
        columns=[(name, is_figure) for name, is_figure, _ in COLUMNS],
        rows=[(row.state, [text(row) for _, _, text in COLUMNS]) for row in rows],
    )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A table of all runs in a folder: how far they are, how good, and how they stand."""

    dir: Positional[Annotated[str, shown("DIR")]]
    """Folder with runs in it, at any depth up to six, or a run."""
    sort: Sort = "run"
    """Order: names from A, states as running, finished, stopped, failed, the others from the greatest."""
    csv: Annotated[str | None, shown("FILE")] = None
    """File to write as CSV, with all figures."""
    page: Annotated[str | None, shown("FILE")] = None
    """File to write as an HTML page."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Print the table and write the files that are asked for; exit code 2 on a user's mistake."""
    flags = read(Runs, sys.argv[1:] if arguments is None else arguments, prog)
    for name in ("csv", "page"):
        if getattr(flags, name) is not None:
            check_target(getattr(flags, name), f"--{name}")
    folder = Path(flags.dir)
    found = find_runs(folder)
    names = [str(path.relative_to(folder)) if path != folder else folder.absolute().name for path in found]
    rows = in_order([read_row(path, name) for path, name in zip(found, names, strict=True)], flags.sort)
    title = f"{len(rows):,} run{'s' * (len(rows) != 1)} in {folder}"
    print_table(rows, title)
    csv_file = lambda: to_csv(rows).encode("utf-8", "replace")
    for file, make in ((flags.csv, csv_file), (flags.page, lambda: to_page(rows, title))):
        if file is not None:
            try:
                write_atomically(Path(file), make())
            except OSError as error:
                raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
