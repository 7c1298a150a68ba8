"""What a run says while it trains: metrics.jsonl, TensorBoard, a bar or plain lines, throughput, data wait.

The trainer talks to one object, :class:`Telemetry`, on every rank; only the main rank writes and prints. A
loop reads

    with telemetry.meter.waiting():
        batch = next(batches)
    ...                                             # the training step
    telemetry.progress(step)                        # every step, after it: no device synchronisation
    telemetry.log(step, {"loss": ..., "lr": ...})   # every run.log_every steps
    with telemetry.meter.paused():                  # evaluation and the like do not count as slow training
        ...
    telemetry.log_event(step, {"knn_top1": ...})

Steps count FINISHED steps from 1, as checkpoints do, and the logged ``epoch`` is the float step /
steps_per_epoch: how many times the data has been gone through, bank warm-up included. The two views of one
figure never differ: whatever is a number in metrics.jsonl is the TensorBoard scalar of that name.
"""

import contextlib
import math
import os
import sys
import time
from datetime import timedelta

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from caco_scale.errors import UserError, one_line
from caco_scale.run.directory import to_plain


class Meter:
    """Throughput (images per second, all ranks) and data wait (share of wall time spent waiting for batches).

    Both over the steps since the last :meth:`read`, paused time excluded. The wait is this rank's host's: an
    upper bound of what the accelerator lost, since kernels queued earlier may still run meanwhile.
    """

    def __init__(self, images_per_step, clock=time.perf_counter):
        self.images_per_step = images_per_step
        self._clock = clock
        self._restart()

    def _restart(self):
        self._start = self._clock()
        self._waited = self._paused = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self):
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self):
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def step(self):
        self._steps += 1

    def read(self):
        """The figures since the last read, which this begins anew; None before a step is finished."""
        seconds = self._clock() - self._start - self._paused
        figures = {"images_per_second": None, "data_wait": None}
        if self._steps and seconds > 0:
            figures["images_per_second"] = round(self._steps * self.images_per_step / seconds, 2)
            figures["data_wait"] = round(min(1.0, self._waited / seconds), 5)
        self._restart()
        return figures


class RemainingTime:
    """Seconds to the end, by the pace since the first finished step (which compiled and filled caches)."""

    def __init__(self, total_steps, clock=time.perf_counter):
        self._total, self._clock, self._first = total_steps, clock, None

    def after(self, step):
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self._total - step) if step > first_step else None


def describe_figures(figures):
    """The figures people watch, in words; what is unknown is left out.

    ``figures``: epoch, epochs (in all), loss, images_per_second, data_wait (share), seconds_left, knn_top1
    (percent).
    """
    words = {
        "epoch": lambda value: f"epoch {value:.2f}/{figures['epochs']:.4g}",
        "loss": lambda value: f"loss {value:.4f}",
        "images_per_second": lambda value: f"{value:,.0f} images/s",
        "data_wait": lambda value: f"data wait {100 * value:.1f}%",
        "seconds_left": lambda value: f"ETA {timedelta(seconds=round(value))}",
        "knn_top1": lambda value: f"kNN {value:.2f}%",
    }
    return [words[name](figures[name]) for name in words if figures.get(name) is not None]


class PlainLines:
    """For logs and pipes: a line per logged step, nothing else, each flushed at once."""

    def __init__(self, stream, total_steps):
        self._stream, self._total = stream, total_steps

    def note(self, text):
        print(text, file=self._stream, flush=True)

    def warn(self, text):
        self.note(f"warning: {text}")

    def advance(self, step, figures):
        pass

    def figures(self, step, figures):
        self.note("  ".join([f"step {step:,}/{self._total:,}", *describe_figures(figures)]))

    def table(self, table):
        # Wide enough for any path: a log has no width, and a folded path cannot be copied.
        Console(file=self._stream, width=1000, force_terminal=False).print(table)

    def close(self):
        self._stream.flush()


class LiveBar:
    """For people: a bar and a line of figures at the bottom of the terminal, notes scroll above it."""

    def __init__(self, stream, total_steps, start_step=0):
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

    def note(self, text):
        self._live.console.print(Text(text), soft_wrap=True)

    def warn(self, text):
        self._live.console.print(Text(f"warning: {text}", style="bold yellow"), soft_wrap=True)

    def advance(self, step, figures):
        left = {"seconds_left": figures.get("seconds_left")}
        self._progress.update(self._task, completed=step, eta="".join(describe_figures(left)))

    def figures(self, step, figures):
        self.advance(step, figures)
        self._line.plain = " · ".join(describe_figures({**figures, "seconds_left": None}))

    def table(self, table):
        self.close()  # the bar is over, the table stands below it
        self._live.console.print(table)

    def close(self):
        self._live.stop()


def is_terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def summary_table(title, rows):
    """A two-column table for the end of a run: (name, value) pairs, values as text."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(str(name)), Text(str(value)))
    return table


class Telemetry:
    """Everything the trainer says. Exists on every rank; off the main rank only ``meter`` is alive.

    ``run_directory``: where metrics.jsonl and TensorBoard go. ``total_steps``, ``start_step`` (the
    checkpoint's, 0 for a fresh start): finished steps; what TensorBoard holds of later steps than the
    checkpoint's is purged. ``images_per_step``: the global batch. Use it in a ``with`` statement, which gives
    the terminal back after errors.
    """

    def __init__(
        self, run_directory, *, total_steps, steps_per_epoch, images_per_step, start_step=0, stream=None
    ):
        self.meter = Meter(images_per_step)
        self.is_main = run_directory.is_main
        self._run = run_directory
        self._steps_per_epoch = steps_per_epoch
        self._left = RemainingTime(total_steps)
        self._figures = {"epochs": total_steps / steps_per_epoch}
        if not self.is_main:
            return
        # Imported here: it takes seconds, and only the main rank writes.
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start_step + 1 if start_step else 0
        self._board = SummaryWriter(str(run_directory.tensorboard), purge_step=purge_step, flush_secs=30)
        stream = sys.stdout if stream is None else stream
        if is_terminal(stream):
            self._display = LiveBar(stream, total_steps, start_step)
        else:
            self._display = PlainLines(stream, total_steps)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def progress(self, step):
        """A step is finished. Cheap: call it after every one."""
        self.meter.step()
        self._figures["seconds_left"] = self._left.after(step)
        if self.is_main:
            self._display.advance(step, self._figures)

    def log(self, step, scalars):
        """The figures of a logged step: a line of metrics.jsonl, TensorBoard, and the console.

        ``scalars``: name -> number, 0-dim tensor allowed (read here, once per logged step). The epoch,
        throughput and data wait since the last logged step are added.
        """
        if not self.is_main:
            return
        epoch = round(step / self._steps_per_epoch, 4)
        record = to_plain({"epoch": epoch, **scalars, **self.meter.read()})
        self._write(step, record)
        self._figures.update(record)
        if "loss" in record and record["loss"] is None:
            self._figures["loss"] = math.nan  # people shall see it
        self._display.figures(step, self._figures)

    def log_event(self, step, record):
        """Something that happens now and then, on a line of its own: an evaluation, a skipped step."""
        if not self.is_main:
            return
        record = to_plain(record)
        self._write(step, record)
        self._figures.update(knn_top1=record.get("knn_top1", self._figures.get("knn_top1")))

    def _write(self, step, record):
        self._run.append_metrics({"step": step, **record})
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                with self._board_errors():
                    self._board.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _board_errors(self):
        """TensorBoard's writer thread keeps an error of the disk and raises it at the next call."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._run.tensorboard}: {error.strerror}; free or mend that place"
            ) from error

    def note(self, text):
        """One line for people, above the bar."""
        if self.is_main:
            self._display.note(text)

    def warn(self, text):
        if self.is_main:
            self._display.warn(text)

    def summary(self, title, rows):
        """The table at the end of a run: (name, value) pairs."""
        if self.is_main:
            self._display.table(summary_table(title, rows))

    def flush(self):
        """What was logged is on the disk when this returns: call it before a checkpoint is complete."""
        if self.is_main:
            self._run.flush()
            with self._board_errors():
                self._board.flush()

    def close(self):
        if self.is_main:
            self._display.close()  # first: the terminal must come back whatever happens below
            try:
                self.flush()
                self._board.close()
            except (OSError, UserError) as error:  # must not hide the error that the run may be ending by
                print(f"warning: the records may lack their end: {one_line(error)}", file=sys.stderr)
            self._run.close()
