"""Threads for requests in flight, which no exit of the process waits for."""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

END_SECONDS = 10  # that an exit gives a thread to come back


class Threads:
    """Daemon threads that run what is submitted, first come, first served; an exit does not wait for them.

    concurrent.futures would run everything that is queued before the process may end.
    """

    def __init__(self, count: int, stop: Callable[[], object] = lambda: None):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        self._stop = stop
        atexit.register(self._end)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Queue a call; its result or error comes in the future."""
        future: Future = Future()
        self._queue.put((future, function, args))
        return future

    def _work(self):
        while True:
            job = self._queue.get()
            if job is None:
                return
            future, function, args = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*args))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, function, args

    def _end(self):
        """At the interpreter's exit: a thread that came back from obstore's code after it would abort."""
        self._stop()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
