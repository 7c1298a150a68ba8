"""What asks a run to stop or to save: a signal, the end of its SLURM job, two files in its directory.

Each rank answers for itself (:class:`JobEnd` by its own clock) or for all (:class:`ControlFiles`, which rank 0 alone
looks at, for a network file system's sake); the loop gathers the answers of :class:`Requests` at every step, and all
ranks act on any.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.patience import Patience
from caco_scale.run.signals import Signals

JOB_END = (
    "SLURM_JOB_END_TIME"  # seconds since 1970; where SLURM is too old to set it (22.05), slurm/lib.sh does
)
OFF = "unset it, or give --run.stop_before_end_seconds 0"
RECENT_STEPS = 20  # of which the slowest counts: the first of a start compiles and fills caches
LOOK_SECONDS = 1.0  # at most so often are the files looked for


def job_end(environment: Mapping[str, str]) -> float | None:
    """When the job ends, in seconds since 1970, or None outside of one. UserError: the variable is no time."""
    text = environment.get(JOB_END, "")
    if not text:
        return None
    try:
        end = float(text)
    except ValueError:
        end = math.nan
    if not 0 < end < math.inf:
        raise UserError(f"{JOB_END} is {text!r}, which is no time in seconds since 1970: {OFF}")
    return end


def check_job_end(environment: Mapping[str, str]) -> None:
    """Before a start: UserError where the job's end is no time, or has passed and so is another job's."""
    end = job_end(environment)
    passed = 0 if end is None else time.time() - end
    if passed > 0:
        raise UserError(f"{JOB_END} was {passed:,.0f} seconds ago, this is another job's environment: {OFF}")


class Requests:
    """All that may ask this rank to stop or to save.

    Args:
        signals: :class:`~caco_scale.run.signals.Signals`, or None: nothing looks for any.
        stop_before_end_seconds: the floor of :class:`JobEnd`, 0 = the job's end is no matter.
    """

    def __init__(self, signals: Signals | None, directory: RunDirectory, stop_before_end_seconds: float):
        self._signals, self._files = (
            signals,
            ControlFiles(directory.path, directory.is_main, disk=directory.disk),
        )
        end = job_end(os.environ) if stop_before_end_seconds else None
        self.job_end = JobEnd(end, stop_before_end_seconds)

    def look(self, evaluation_is_due: bool) -> tuple[str | None, bool]:
        """What this rank knows of: why to stop (a signal's name, STOP, the job's end) or None; whether to save."""
        stop, save = self._files.look()
        if self._signals and self._signals.requested:
            return self._signals.requested, save
        if stop:
            return self._files.stop.name, save
        return None if self.job_end.leaves_time(for_evaluation=evaluation_is_due) else JOB_END, save

    def save_begins(self, step: int) -> None:
        """The checkpoint of ``step`` answers what has asked for one so far."""
        self._files.save_begins(step)

    def save_is_complete(self, step: int, seconds: float) -> None:
        """The checkpoint of ``step`` is complete; ``seconds``: what it took."""
        self.job_end.took("save", seconds)
        self._files.save_is_complete(step)

    def state_dict(self) -> dict:
        return {"seconds": self.job_end.seconds}

    def load_state_dict(self, values: dict) -> None:
        self.job_end.seconds |= values.get("seconds", {})


class JobEnd:
    """The end of the job against what must still fit before it: a step, two saves, a floor.

    Two saves, for one may be in flight when the last one begins. ``seconds`` keeps what a save and an evaluation
    took; it travels in checkpoints, so that a resumed run knows from its first step. Until measured they count as 0.

    Args:
        end: seconds since 1970, or None: there is none, and everything fits.
        floor: seconds (``run.stop_before_end_seconds``); 0 = no limit either.
        clock: seconds since 1970.
    """

    def __init__(self, end: float | None, floor: float, clock: Callable[[], float] = time.time):
        self.end = end if floor else None
        self._floor, self._clock = floor, clock
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self.seconds = {"save": 0.0, "evaluation": 0.0}

    def took(self, what: str, seconds: float) -> None:
        """``what``: step, save or evaluation."""
        if what == "step":
            self._steps.append(seconds)
        else:
            self.seconds[what] = seconds

    def leaves_time(self, for_evaluation: bool = False) -> bool:
        """Whether another step fits, or the evaluation and a step, and then a stop in good order."""
        if self.end is None:
            return True
        needed = max(self._steps, default=0.0) + 2 * self.seconds["save"] + self._floor
        if for_evaluation:
            needed += self.seconds["evaluation"]
        return self.end - self._clock() >= needed


class ControlFiles:
    """``STOP`` and ``SAVE`` in the run directory, which a user makes with ``touch``.

    STOP stays: a run that finds it does not start. SAVE is removed when the checkpoint that it asked for is
    complete, unless it was touched again meanwhile: then that is another request.
    """

    def __init__(
        self,
        folder: str | Path,
        is_main: bool,
        clock: Callable[[], float] = time.monotonic,
        disk: Patience | None = None,
    ):
        self._disk = disk or Patience(folder)
        self.stop, self.save = Path(folder) / "STOP", Path(folder) / "SAVE"
        self._is_main, self._clock, self._next_look = is_main, clock, -math.inf
        self._asked: tuple | None = None  # the SAVE that is being answered, and the step of its checkpoint

    def refuse_stop(self) -> None:
        """Raise a UserError where STOP is there (rank 0)."""
        if self._is_main and self.stop.exists():
            raise UserError(f"{self.stop} is there, which stops this run: remove it to train on")

    def look(self) -> tuple[bool, bool]:
        """What is newly asked for -> (whether to stop, whether to save); nothing between looks and off rank 0."""
        if not self._is_main or self._clock() < self._next_look:
            return False, False
        self._next_look = self._clock() + LOOK_SECONDS
        found, stop = self._disk.call(lambda: (_identity(self.save), self.stop.exists()))
        return stop, found is not None and found != (self._asked or (None,))[0]

    def save_begins(self, step: int) -> None:
        """The checkpoint of ``step``, begun now, answers the SAVE that is there now."""
        found = self._disk.call(lambda: _identity(self.save)) if self._is_main else None
        self._asked = None if found is None else (found, step)

    def save_is_complete(self, step: int) -> None:
        """There is a complete checkpoint of ``step``: remove the SAVE that it answers."""
        if self._asked is not None and step >= self._asked[1]:
            self._disk.call(self._remove_answered)
            self._asked = None

    def _remove_answered(self):
        assert self._asked is not None
        # Renamed first: a touch up to here shows in its times, a later one makes a new file.
        aside = self.save.with_name(".SAVE")
        try:
            os.rename(self.save, aside)
            if _identity(aside) == self._asked[0]:
                aside.rmdir() if aside.is_dir() else aside.unlink()
            else:
                os.replace(aside, self.save)
        except FileNotFoundError:  # the user took it back
            pass
        except OSError as error:
            raise UserError(
                f"cannot remove {self.save}: {error.strerror}; make the run directory writable"
            ) from error


def _identity(path):
    """What changes with every touch, or None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
