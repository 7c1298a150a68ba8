"""The table of a study: a line for each of its runs, over the seeds; as CSV, and for a terminal.

A spread is the sample standard deviation (divided by n − 1) of n seeds; one seed has none.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from caco_scale.sweep.runs import Result
from caco_scale.sweep.study import Planned


@dataclass
class Entry:
    """How a planned run stands. ``state``: "done", "failed: why", "stopped" or "to do"."""

    planned: Planned
    result: Result
    state: str = "to do"


@dataclass(frozen=True)
class Line:
    """A run of the study over its seeds."""

    name: str
    entries: Sequence[Entry]

    @property
    def first(self) -> Planned:
        return self.entries[0].planned

    def values(self, figure: str) -> list[float]:
        """A figure of the seeds that are done, where it was logged."""
        found = [getattr(entry.result, figure) for entry in self.entries if entry.state == "done"]
        return [value for value in found if value is not None]

    def open(self) -> str:
        """What is not done, seed by seed."""
        return "; ".join(f"seed {e.planned.seed} {e.state}" for e in self.entries if e.state != "done")


def lines(entries: Iterable[Entry]) -> list[Line]:
    """A :class:`Line` for each name, in the entries' order."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.planned.name, []).append(entry)
    return [Line(name, seeds) for name, seeds in by_name.items()]


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation); None for what too few values do not have."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def to_csv(found: Sequence[Line], fields: Sequence[str]) -> str:
    """The table as CSV; ``fields`` are the study's varied ones, a column each (empty: as in the recipe)."""
    rows = []
    for line in found:
        row: dict[str, Any] = {"run": line.name}
        row |= {field: line.first.varied.get(field, "") for field in fields}
        knn = line.first.config.eval
        row |= {"knn_of": "backbone features", "knn_k": knn.knn_k, "knn_temperature": knn.knn_temperature}
        done = [entry.planned.seed for entry in line.entries if entry.state == "done"]
        row |= {"seeds_done": _words(done), "n": len(done)}
        for figure in ("final", "best", "pixels", "untrained", "seconds"):
            values = line.values(figure)
            mean, spread = mean_and_spread(values)
            row |= {f"{figure}_mean": _number(mean), f"{figure}_sd": _number(spread)}
            row |= {figure: _words(map(_number, values))}
        row |= {"best_epoch": _words(f"{epoch:g}" for epoch in line.values("best_epoch"))}
        row |= {"not_done": line.open()}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_rich(found: Sequence[Line], title: str) -> Table:
    """The table for a terminal."""
    measures = {(line.first.config.eval.knn_k, line.first.config.eval.knn_temperature) for line in found}
    knn = " / ".join(f"k {k}, T {t:g}" for k, t in sorted(measures))
    table = Table(
        title=title,
        caption=f"kNN top-1 in percent on backbone features ({knn}), mean ± sample standard deviation over n seeds",
    )
    table.add_column("run")
    for name in ("kNN, last", "kNN, best", "at epoch", "pixels", "untrained", "minutes", "n"):
        table.add_column(name, justify="right")
    table.add_column("not done")
    for line in found:
        epochs = " ".join(f"{epoch:.3g}" for epoch in line.values("best_epoch"))
        figures = [_shown(line.values(figure)) for figure in ("final", "best")]
        before = [_shown(line.values(figure)) for figure in ("pixels", "untrained")]
        minutes = [seconds / 60 for seconds in line.values("seconds")]
        num_done = str(sum(entry.state == "done" for entry in line.entries))
        table.add_row(line.name, *figures, epochs, *before, _shown(minutes), num_done, line.open())
    return table


def _shown(values):
    mean, spread = mean_and_spread(values)
    if mean is None:
        return ""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def _number(value):
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _words(values):
    return " ".join(map(str, values))
