"""What people see of a run: a live bar on a terminal, plain lines in a log, a table at the end."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text


def describe_figures(figures: dict) -> list[str]:
    """The figures people watch, in words; what is unknown is left out.

    ``figures``: epoch, epochs (in all), loss, images_per_second, data_wait (share), seconds_left, knn_top1
    (percent), knn_step (of which it is, 0: before training).
    """
    words = {
        "epoch": lambda value: f"epoch {value:.2f}/{figures['epochs']:.4g}",
        "loss": lambda value: f"loss {value:.4f}",
        "images_per_second": lambda value: f"{value:,.0f} images/s",
        "data_wait": lambda value: f"data wait {100 * value:.1f}%",
        "seconds_left": lambda value: f"ETA {timedelta(seconds=round(value))}",
        "knn_top1": lambda value: f"kNN {value:.2f}% {_of_step(figures.get('knn_step'))}".rstrip(),
    }
    return [words[name](figures[name]) for name in words if figures.get(name) is not None]


def _of_step(step):
    return "" if step is None else f"of step {step:,}" if step else "before training"


class PlainLines:
    """For logs and pipes: a line per logged step, nothing else, each flushed at once."""

    def __init__(self, stream: TextIO, total_steps: int):
        self._stream, self._total = stream, total_steps

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def advance(self, step: int, figures: dict) -> None:
        pass

    def figures(self, step: int, figures: dict) -> None:
        self.note("  ".join([f"step {step:,}/{self._total:,}", *describe_figures(figures)]))

    def table(self, table: Table) -> None:
        # Wide enough for any path: a log has no width, and a folded path cannot be copied.
        Console(file=self._stream, width=1000, force_terminal=False).print(table)

    def close(self) -> None:
        self._stream.flush()


class LiveBar:
    """For people: a bar and a line of figures at the bottom of the terminal, notes scroll above it."""

    def __init__(self, stream: TextIO, total_steps: int, start_step: int = 0):
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[eta]}"),
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, eta="")
        self._line = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(
            Group(self._progress, self._line),
            console=Console(file=stream, force_terminal=True),
            refresh_per_second=4,
        )
        self._live.start()

    def note(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self._live.console.print(Text(f"warning: {text}", style="bold yellow"), soft_wrap=True)

    def advance(self, step: int, figures: dict) -> None:
        left = {"seconds_left": figures.get("seconds_left")}
        self._progress.update(self._task, completed=step, eta="".join(describe_figures(left)))

    def figures(self, step: int, figures: dict) -> None:
        self.advance(step, figures)
        self._line.plain = " · ".join(describe_figures({**figures, "seconds_left": None}))

    def table(self, table: Table) -> None:
        self.close()  # the bar is over, the table stands below it
        self._live.console.print(table)

    def close(self) -> None:
        self._live.stop()


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def summary_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A two-column table for the end of a run: (name, value) pairs, values as text."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(str(name)), Text(str(value)))
    return table
