"""How fast a run is: throughput, the share of time it waits for data, the time that is left."""

import contextlib
import time
from collections.abc import Callable, Generator


class Meter:
    """Throughput (images per second, all ranks) and data wait (share of wall time spent waiting for batches).

    Both over the steps since the last :meth:`read`, paused time excluded. The wait is this rank's host's: an
    upper bound of what the accelerator lost, since kernels queued earlier may still run meanwhile.
    """

    def __init__(self, images_per_step: int, clock: Callable[[], float] = time.perf_counter):
        self.images_per_step = images_per_step
        self._clock = clock
        self._restart()

    def _restart(self):
        self._start = self._clock()
        self._waited = self._paused = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float | None]:
        """The figures since the last read, which this begins anew; None before a step is finished."""
        seconds = self._clock() - self._start - self._paused
        figures: dict[str, float | None] = {"images_per_second": None, "data_wait": None}
        if self._steps and seconds > 0:
            figures["images_per_second"] = round(self._steps * self.images_per_step / seconds, 2)
            figures["data_wait"] = round(min(1.0, self._waited / seconds), 5)
        self._restart()
        return figures


class RemainingTime:
    """Seconds to the end, by the pace since the first finished step (which compiled and filled caches)."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter):
        self._total, self._clock = total_steps, clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> float | None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self._total - step) if step > first_step else None
