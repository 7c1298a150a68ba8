"""The processes of a sweep: each run is a ``python -m caco_scale.pretrain`` of its own, some at a time.

Two locks in the sweep's folder. ``.sweep.lock`` is the sweep's. ``.runs.lock`` its runs hold, too, by inheritance: who
starts a sweep after one that was killed waits until the last of that one's runs has saved and gone. The kernel tells
them of the sweep's death (Linux; elsewhere they train on, and the next sweep waits for their end).
"""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from caco_scale.errors import UserError
from caco_scale.run.lock import be_alone
from caco_scale.run.signals import PR_SET_PDEATHSIG
from caco_scale.sweep.runs import CONSOLE
from caco_scale.sweep.study import Planned

PROGRAM = (sys.executable, "-m", "caco_scale.pretrain")
ORPHAN_SECONDS = 900  # that the runs of a killed sweep may take for their step, evaluation and save
POLL_SECONDS = 0.2


@contextmanager
def alone_in(folder: Path) -> Generator[int]:
    """The folder for this sweep alone -> the descriptor that its runs are to inherit.

    Raises:
        UserError: another sweep works in it, a run of a killed one does not end, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own, runs = (open(folder / name, "a") for name in (".sweep.lock", ".runs.lock"))  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"cannot write the sweep's folder {folder}: {error.strerror}; give another --dir"
        ) from None
    with own, runs:
        be_alone(own, f"another sweep works in {folder}: wait for its end, or give another --dir")
        _wait_for_orphans(runs, folder)
        yield runs.fileno()


def _wait_for_orphans(lock, folder):
    deadline, told = time.monotonic() + ORPHAN_SECONDS, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"a run of an earlier sweep still works in {folder}: end it (ps shows caco_scale.pretrain with "
                    "that run.dir), or give another --dir"
                ) from None
            if not told:
                print(
                    f"waiting for a run that an earlier sweep in {folder} has left to save and end",
                    flush=True,
                )
                told = True
            time.sleep(POLL_SECONDS)
        except OSError:  # a file system without locks
            return None


class Runner:
    """Starts runs, ``jobs`` at a time, and waits for them.

    ``devices``: CUDA devices that the jobs share out, one each in turn; empty: as the environment says. ``lock``: the
    descriptor that the runs inherit. ``finished(planned, exit_code)`` is called at the end of each.
    """

    def __init__(
        self, jobs: int, devices: Sequence[str], lock: int, finished: Callable[[Planned, int], object]
    ):
        self._jobs, self._devices, self._lock, self._finished = jobs, devices, lock, finished
        self._running: dict[int, tuple[Planned, subprocess.Popen]] = {}  # by slot
        self.stopped_by: str | None = None

    def run(self, plan: Sequence[Planned]) -> None:
        """All of ``plan``, until its end or until a signal stops it: then the running ones save and end, too."""
        waiting = deque(plan)
        before = {number: self._take(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            while self._running or (waiting and not self.stopped_by):
                for slot in range(self._jobs):
                    if waiting and slot not in self._running and not self.stopped_by:
                        planned = waiting.popleft()
                        self._running[slot] = (planned, self._start(planned, slot))
                self._reap()
                time.sleep(POLL_SECONDS)
        finally:
            for _, process in self._running.values():  # an error of our own: leave none behind
                process.terminate()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number):
        before = signal.getsignal(number)
        if not (number == signal.SIGHUP and before == signal.SIG_IGN):  # nohup
            signal.signal(number, self._stop)
        return before

    def _stop(self, number, frame):
        """The first signal asks the runs to save and end, the second ends them at once."""
        again, self.stopped_by = self.stopped_by, signal.Signals(number).name
        for _, process in self._running.values():
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    def _reap(self):
        for slot, (planned, process) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[slot]
                self._finished(planned, code)

    def _start(self, planned, slot):
        planned.directory.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        if self._jobs > 1:  # each would take all cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self._jobs)))
        with open(planned.directory / CONSOLE, "ab") as console:
            return subprocess.Popen(
                [*PROGRAM, *planned.command()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],
                start_new_session=True,  # a terminal's Ctrl-C is for the sweep, which tells its runs
                preexec_fn=_end_with(os.getpid()),  # no thread of ours holds a lock
            )


def _end_with(parent: int) -> Callable[[], None] | None:
    """For a child before its program starts: SIGTERM when ``parent`` dies, however it does."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask():
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask
