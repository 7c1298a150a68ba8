"""Where a step goes: its parts measured by the device's own clock, and a trace of everything for the tools.

The parts are named where they run, ``with part("query"): ...``, which costs nothing while nobody measures.
"""

import contextlib
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol, Self

import torch

from caco_scale.errors import UserError

# In the order of a step. They follow each other; "other" is what none of them covers.
PARTS = ("data", "augmentation", "query", "key", "bank", "backward", "optimizer", "bank step", "ema")
COMMUNICATION = ("nccl:", "gloo:")  # torch's names for collectives in a trace
SKIPPED_STEPS = 3  # compile, fill caches, settle: not what later steps are like


class PartMeter(Protocol):
    """Measures the parts of a step."""

    def measure(self, name: str) -> contextlib.AbstractContextManager: ...


_clock: PartMeter | None = None  # who measures now


def measure_parts_by(meter: PartMeter | None) -> None:
    """From here on ``meter`` is told of every part; None: nobody."""
    global _clock
    assert meter is None or _clock is None, "one clock at a time"
    _clock = meter


@contextlib.contextmanager
def part(name: str) -> Generator[None]:
    """Mark a part of a step (one of :data:`PARTS`) for the clock and the trace."""
    if _clock is None:
        yield
        return
    with torch.profiler.record_function(f"step: {name}"), _clock.measure(name):
        yield


class PartsClock:
    """Seconds of each part, added up over steps; use as a context, around whole steps.

    On a GPU they are those of its stream, from events around what the host queued (no synchronisation until
    :meth:`seconds`): work that overlaps on other streams, such as gradient exchange, is inside the part that waits
    for it.
    """

    def __init__(self, device: torch.device | str):
        self._on_gpu = torch.device(device).type == "cuda"
        self._spans = []

    def __enter__(self) -> Self:
        measure_parts_by(self)
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        measure_parts_by(None)
        self._spans.append(("total", self._start, self._now()))

    @contextlib.contextmanager
    def measure(self, name: str) -> Generator[None]:
        assert name in PARTS, name
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """``{part: seconds, "other": ..., "total": ...}`` of all steps so far. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found = dict.fromkeys((*PARTS, "total"), 0.0)
        for name, start, stop in self._spans:
            found[name] += start.elapsed_time(stop) / 1e3 if self._on_gpu else stop - start
        total = found.pop("total")
        return {**found, "other": max(0.0, total - sum(found.values())), "total": total}


class StepProfiler:
    """``run.profile_steps``: after a few steps to settle, writes ``trace.rank<R>.json`` and ``parts.rank<R>.txt``.

    Args:
        folder: a path that is made when there is something to write.
        num_steps: steps to measure; 0: none.
        device: where they run.
        rank: of this process; each writes its own.
        note: told of the table when it is there.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        device: torch.device,
        rank: int,
        note: Callable[[str], object] = lambda text: None,
    ):
        self._folder, self._num_steps, self._device, self._rank = folder, num_steps, device, rank
        self._note = note
        self._steps = 0
        self._clock = self._trace = None

    def before_step(self) -> None:
        """Begin to measure, if this step is the first to be measured."""
        if self._num_steps and self._steps == SKIPPED_STEPS:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.__enter__()
            self._clock = PartsClock(self._device).__enter__()

    def after_step(self, is_last: bool = False) -> None:
        """Count a step; after the last one to be measured, or of the run, write the files."""
        self._steps += 1
        if is_last or self._steps == SKIPPED_STEPS + self._num_steps:
            self.close()

    def close(self) -> None:
        """Write what was measured, if the run ends before all of it."""
        if self._clock is None or self._trace is None:
            return
        clock, trace, self._clock = self._clock, self._trace, None
        clock.__exit__()
        trace.__exit__(None, None, None)
        self._write(clock.seconds(), trace, self._steps - SKIPPED_STEPS)

    def _write(self, seconds, trace, num_steps):
        exchange = sum(
            event.self_device_time_total if self._device.type == "cuda" else event.cpu_time_total
            for event in trace.key_averages()
            if event.key.startswith(COMMUNICATION)
        )
        table = parts_table(seconds, max(num_steps, 1), exchange / 1e6)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._folder / f"trace.rank{self._rank}.json"))
            (self._folder / f"parts.rank{self._rank}.txt").write_text(table + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder}: {error.strerror}; free or fix that place"
            ) from error
        self._note(f"{table}\ntrace and table: {self._folder}")


def parts_table(seconds: dict[str, float], num_steps: int, exchange_seconds: float) -> str:
    """The parts of a step as text: milliseconds and share of each; communication overlaps them and is extra."""
    lines = [f"{'part':16}{'ms a step':>12}{'share':>9}"]
    for name, value in seconds.items():
        lines.append(f"{name:16}{1e3 * value / num_steps:12.2f}{value / (seconds['total'] or 1):9.1%}")
    lines.append(
        f"{'communication':16}{1e3 * exchange_seconds / num_steps:12.2f}{'within':>9}  (collectives' own time)"
    )
    return "\n".join(lines)
