"""Contenders measured side by side: each in a process of its own, the rounds in turn.

Whatever else the machine does then meets all alike. Seconds of CPU time count what the work costs, and change less
with the machine's load than the clock does; threads that wait for others sleep, so that they do not count.
"""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from caco_scale.errors import UserError, one_line

Measured = tuple[dict[str, Any], list[str]]  # figures for the JSON, "rows" for the table; notes below it
Contender = Callable[[], Any]  # one round; what it returns may be a function, which gives the round's value

_run: Contender | None = None  # in a contender's process: what is measured


@dataclass(frozen=True)
class Round:
    """One measurement. ``extra_bytes``: the most memory held so far beyond what was there before the first round."""

    cpu_seconds: float
    seconds: float
    extra_bytes: int
    peak_bytes: int
    value: Any


def in_turn(
    contenders: Mapping[str, Callable[[], Contender]], rounds: int, threads: int = 1, values: bool = True
) -> dict[str, list[Round]]:
    """``{name: [Round, ...]}``: every contender once to warm up, and then ``rounds`` times.

    ``contenders``: name -> a function that pickles, called once in the contender's process to prepare; what it
    returns is called in every round, and may return a function for its value, which is called outside the
    measurement, in the warm-up alone (the first of the list) and with ``values``.
    """
    import torch

    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for the children: a thread that waits takes no CPU time
    context = multiprocessing.get_context("spawn")
    pools = {
        name: ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(prepare, threads))
        for name, prepare in contenders.items()
    }
    results = {name: [] for name in contenders}
    try:
        for number in range(rounds + 1):
            for name, pool in pools.items():
                results[name].append(pool.submit(_timed, values and number == 0).result())
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        raise UserError(
            f"{name!r} needs more memory than is free, give a smaller case: {one_line(error)}"
        ) from None
    finally:
        for pool in pools.values():
            pool.shutdown()
    return results


def median(measured: list[Round], figure: str) -> float:
    """The median of a figure over the rounds after the warm-up."""
    return statistics.median(getattr(one, figure) for one in measured[1:])


def significant(value: float) -> float:
    """To four digits: a ratio of two such figures is right to three, however slow what was measured is."""
    return float(f"{value:.4g}")


def _prepare(prepare: Callable[[], Contender], threads: int) -> None:
    global _run
    import torch

    torch.set_num_threads(threads)
    _run = prepare()
    _Memory.before = _Memory.now()


def _timed(with_value: bool) -> Round:
    assert _run is not None  # _prepare has run in this process
    start, start_cpu = time.perf_counter(), time.process_time()
    value = _run()
    _Memory.wait()
    cpu, wall = time.process_time() - start_cpu, time.perf_counter() - start
    peak = _Memory.peak()
    return Round(cpu, wall, peak - _Memory.before, peak, value() if with_value else None)


class _Memory:
    """This process's memory: torch's on a GPU where the contender uses one, else what the system holds for it."""

    before = 0

    @staticmethod
    def now():
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @staticmethod
    def peak():
        import torch

        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @staticmethod
    def wait():
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
