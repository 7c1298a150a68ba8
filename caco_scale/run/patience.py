"""Waiting for a disk, with an end: one that hangs ends a run by words, and a request to stop always wins.

A thread that the kernel keeps in a system call hears no signal. So the training thread asks nothing of the run's disk
itself: :class:`Patience` has another thread do it and looks at the clock, and at what asks the run to stop, meanwhile.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from caco_scale.errors import Hung

T = TypeVar("T")

STOPPED_SECONDS = 60.0  # of silence, once the run is asked to stop
LOOK_SECONDS = 0.2  # between two looks at the clock


class Patience:
    """How long a process waits for one place on a disk.

    Args:
        place: the path, as the error names it.
        seconds: how long it may be silent (``run.timeout_seconds``); None: for ever, and the caller's thread does all.
        stop: what asks the run to stop (a signal's name) or None, as of now; the silence then has at most
            ``STOPPED_SECONDS``.
    Attributes:
        gone: the place did not answer: whatever is asked of it from now on is refused at once.
    """

    def __init__(
        self, place: object, seconds: float | None = None, stop: Callable[[], str | None] = lambda: None
    ):
        self.gone = False
        self._place, self._seconds, self._stop = place, seconds, stop
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def of(self, place: object) -> "Patience":
        """As much for another place."""
        return Patience(place, self._seconds, self._stop)

    def rest(self) -> None:
        """Let the thread go, until there is something to do again."""
        if self._thread is not None and not self.gone:
            self._tasks.put(None)
            self._thread = None

    def call(self, function: Callable[[], T], more: float = 0) -> T:
        """What ``function`` returns or raises. UserError (:class:`~caco_scale.errors.Hung`): it does neither.

        ``more``: as of :meth:`until`.
        """
        if self._seconds is None or threading.current_thread() is self._thread:
            return function()
        self._refuse_if_gone()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"disk of {self._place}", daemon=True)
            self._thread.start()
        task = _Task(function)
        self._tasks.put(task)
        self.until(task.ended.wait, more=more)
        if task.error is not None:
            raise task.error
        return task.result

    def until(
        self, done: Callable[[float], bool], progress: Callable[[], Any] = lambda: None, more: float = 0
    ) -> None:
        """Wait until ``done(seconds)``, which itself waits for so long at most, is true.

        Args:
            progress: a value that changes while something happens.
            more: seconds beside the usual ones, for much that is to be written.
        Raises:
            Hung: nothing happened for too long.
        """
        if self._seconds is None:
            while not done(LOOK_SECONDS):
                pass
            return
        self._refuse_if_gone()
        heard, seen, asked, reason = time.monotonic(), progress(), None, None
        while not done(LOOK_SECONDS):
            now, state = time.monotonic(), progress()
            if state != seen:
                heard, seen = now, state
            if reason is None:
                asked, reason = now, self._stop()
            limit = self._seconds + more
            if reason is not None:
                limit, heard = min(limit, STOPPED_SECONDS + more), max(heard, asked or now)
            if now - heard > limit:
                self._give_up(limit, reason)

    def _give_up(self, limit, reason):
        self.gone = True
        after = f" after {reason}" if reason else ""
        raise Hung(
            f"{self._place} does not answer, {limit:,.0f} seconds of silence{after}: the disk hangs; once it answers, "
            "the same command goes on from the last complete checkpoint"
        )

    def _refuse_if_gone(self):
        if self.gone:
            raise Hung(f"{self._place} does not answer")

    def _work(self):
        while (task := self._tasks.get()) is not None:
            task.run()


class _Task:
    """A call that another thread makes."""

    def __init__(self, function):
        self._function, self.ended = function, threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self):
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        self.ended.set()
