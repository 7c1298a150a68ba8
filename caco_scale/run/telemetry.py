"""What a run says while it trains: metrics.jsonl, TensorBoard, trackers, a bar or lines, throughput, data wait.

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
steps_per_epoch: how many times the data has been gone through, bank warm-up included. The views of one
figure never differ: whatever is a number in metrics.jsonl is the TensorBoard scalar of that name, and the trackers'.
"""

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from caco_scale.errors import Hung, UserError, one_line
from caco_scale.run.directory import RunDirectory, now
from caco_scale.run.display import LiveBar, PlainLines, is_terminal, summary_table
from caco_scale.run.files import to_plain
from caco_scale.run.meter import Meter, RemainingTime
from caco_scale.run.trackers import Trackers, numbers_of


class Telemetry:
    """Everything the trainer says. Exists on every rank; off the main rank only ``meter`` is alive.

    ``run_directory``: where metrics.jsonl and TensorBoard go. ``total_steps``, ``start_step`` (the
    checkpoint's, 0 for a fresh start): finished steps; what TensorBoard holds of later steps than ``kept_step``
    (default: the checkpoint's) is purged. ``images_per_step``: the global batch. ``on_metrics``: called on
    the main rank with every record of metrics.jsonl. ``trackers``: of this start, ended with it. :meth:`close` gives
    the terminal back, after errors too.
    """

    def __init__(
        self,
        run_directory: RunDirectory,
        *,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        start_step: int = 0,
        kept_step: int | None = None,
        stream: TextIO | None = None,
        on_metrics: Callable[[dict], object] | None = None,
        trackers: Trackers | None = None,
    ):
        self.meter = Meter(images_per_step)
        self.is_main = run_directory.is_main
        self._run, self._on_metrics, self._trackers = run_directory, on_metrics, trackers
        self._steps_per_epoch = steps_per_epoch
        self._left = RemainingTime(total_steps)
        self._figures: dict[str, Any] = {"epochs": total_steps / steps_per_epoch}
        if not self.is_main:
            return
        # Imported here: it takes seconds, and only the main rank writes.
        from torch.utils.tensorboard import SummaryWriter

        kept_step = start_step if kept_step is None else kept_step
        purge_step = kept_step + 1 if kept_step else 0
        folder = str(run_directory.tensorboard)
        self._thread_hook, threading.excepthook = threading.excepthook, self._of_other_threads
        try:
            with self._board_errors():
                self._board = run_directory.disk.call(
                    lambda: SummaryWriter(folder, purge_step=purge_step, flush_secs=30)
                )
        except UserError:
            threading.excepthook = self._thread_hook
            raise
        stream = sys.stdout if stream is None else stream
        if is_terminal(stream):
            self._display: LiveBar | PlainLines = LiveBar(stream, total_steps, start_step)
        else:
            self._display = PlainLines(stream, total_steps)
        if trackers:
            for line in trackers.notes:
                self.note(line)
            self._warn_all(trackers.take_warnings())

    def progress(self, step: int) -> None:
        """A step is finished. Cheap: call it after every one."""
        self.meter.step()
        self._figures["seconds_left"] = self._left.after(step)
        if self.is_main:
            self._display.advance(step, self._figures)

    def log(self, step: int, scalars: dict) -> None:
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

    def log_event(self, step: int, record: dict) -> None:
        """Something that happens now and then, on a line of its own: an evaluation, a skipped step."""
        if not self.is_main:
            return
        record = to_plain(record)
        self._write(step, record)
        if record.get("knn_top1") is not None:
            self._figures.update(knn_top1=record["knn_top1"], knn_step=step)

    def _write(self, step, record):
        line = {"step": step, **record, "time": now()}
        self._run.append_metrics(line)
        if self._on_metrics:
            self._on_metrics(line)
        numbers = numbers_of(record)
        with self._board_errors():  # its queue waits for the disk when it is full
            self._run.disk.call(lambda: [self._board.add_scalar(n, v, step) for n, v in numbers.items()])
        if self._trackers:
            self._warn_all(self._trackers.log(step, numbers))

    def _of_other_threads(self, error):
        """TensorBoard's writer would print its traceback, beside the one line that its error becomes here."""
        if type(error.thread).__module__.split(".")[0] != "tensorboard":
            self._thread_hook(error)

    @contextlib.contextmanager
    def _board_errors(self):
        """TensorBoard's writer thread keeps an error of the disk and raises it at the next call."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._run.tensorboard}: {error.strerror}; free or fix that place"
            ) from error

    def note(self, text: str) -> None:
        """One line for people, above the bar."""
        if self.is_main:
            self._display.note(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            self._display.warn(text)

    def _warn_all(self, lines):
        for line in lines:
            self.warn(line)

    def summary(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """The table at the end of a run: (name, value) pairs."""
        if self.is_main:
            self._display.table(summary_table(title, rows))

    def flush(self) -> None:
        """What was logged is on the disk when this returns: call it before a checkpoint is complete."""
        if self.is_main:
            self._run.flush()
            with self._board_errors():
                self._run.disk.call(self._board.flush)

    def close(self) -> None:
        if self.is_main:
            self._display.close()  # first: the terminal must come back whatever happens below
            try:
                self.flush()
                self._run.disk.call(self._board.close)
            except Hung:  # as the run, which ends by it, says itself
                pass
            except (OSError, UserError) as error:  # must not hide the error that the run may be ending by
                print(f"warning: the records may lack their end: {one_line(error)}", file=sys.stderr)
            for line in self._trackers.finish() if self._trackers and not self._run.disk.gone else ():
                print(f"warning: {line}", file=sys.stderr)
            if threading.excepthook == self._of_other_threads:
                threading.excepthook = self._thread_hook
            self._run.close()
