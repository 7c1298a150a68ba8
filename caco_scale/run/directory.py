"""The run directory: what a run leaves on disk (how it is written: :mod:`caco_scale.run.files`).

config.yaml  environment.json  attempts.jsonl  metrics.jsonl  corrupt.jsonl  weights.json (of model.weights)
trackers.json and the trackers' own folders (of run.trackers)
checkpoints/  tensorboard/  DONE | INTERRUPTED

**One rule for all records of steps** (metrics.jsonl, corrupt.jsonl): what stands up to step s is on the disk before
the checkpoint of s is complete, and a start that goes on from it drops what stands after it.
"""

import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self, TypeVar

from caco_scale.errors import UserError
from caco_scale.run.files import (
    JsonLines,
    last_json_line,
    open_ordinary,
    read_json_lines,
    remove_file,
    remove_leftovers,
    replace_file,
    to_json,
)
from caco_scale.run.lock import be_alone
from caco_scale.run.patience import Patience

METRICS, CORRUPT = "metrics.jsonl", "corrupt.jsonl"
RECORDS = (METRICS, CORRUPT)  # of steps

Method = TypeVar("Method", bound=Callable)


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _step_of(record, unknown):
    step = record.get("step", unknown)
    return step if isinstance(step, (int, float)) else unknown


def check_place(path: str | Path) -> str:
    """Whether a run directory can be made and written -> where it is, with its disk's free space.

    Raises:
        UserError: it cannot.
    """
    path = Path(path).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK) or not _takes_files(existing):
        raise UserError(
            f"run.dir {path} cannot be written ({existing}): correct its rights, or give another --run.dir"
        )
    return f"run.dir {path}, {shutil.disk_usage(existing).free / 1e9:,.0f} GB free"


def _takes_files(folder):
    """Whether a file can be made there, by one without a name: root may write by the rights what is read-only."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        return error.errno in (
            errno.EOPNOTSUPP,
            errno.EISDIR,
            errno.EINVAL,
        )  # no such files here: nothing is known
    return True


def _on_disk(method: Method) -> Method:
    """A method of :class:`RunDirectory` that its ``disk`` does."""

    @functools.wraps(method)
    def bounded(self, *arguments, **options):
        return self.disk.call(lambda: method(self, *arguments, **options))

    return bounded  # ty: ignore[invalid-explicit-return]


class RunDirectory:
    """One run's directory. Only the main rank writes; on the others every writing method does nothing.

    Use it as a context: leaving it closes the files and gives the directory free.

    Args:
        disk: how long it may be silent.
    Raises:
        UserError: the place cannot be created or written (a file in the way, no right, a full disk), or is silent.
    """

    def __init__(self, path: str | Path, is_main: bool, disk: Patience | None = None):
        self.path = Path(path)
        self.is_main = is_main
        self.disk = disk or Patience(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / METRICS
        self._records: dict[str, JsonLines] = {}  # those that are open
        self._lock: IO | None = None
        if is_main:
            self._take()

    @_on_disk
    def _take(self):
        """Make the directory, have it alone, and clear what a killed process left of the files that it replaced."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open_ordinary(self.path / ".lock", "a+b")  # held as long as the run
        except OSError as error:
            raise UserError(
                f"cannot create the run directory {self.path}: {error.strerror}; "
                "name another place with run.dir"
            ) from error
        be_alone(
            self._lock,
            f"{self.path} is in use by another running process: end that one, or give another run.dir",
        )
        remove_leftovers(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @_on_disk
    def write_config(self, text: str) -> None:
        if self.is_main:
            replace_file(self.path / "config.yaml", text)

    @_on_disk
    def write_environment(self, environment: dict) -> None:
        if self.is_main:
            replace_file(self.path / "environment.json", to_json(environment, indent=2) + "\n")

    @_on_disk
    def write_weights(self, facts: dict) -> None:
        """What the run has started from, and what became of every key of it."""
        if self.is_main:
            replace_file(self.path / "weights.json", to_json(facts, indent=2) + "\n")

    @_on_disk
    def next_attempt(self) -> int | None:
        """The number that :meth:`start_attempt` will give; None off the main rank."""
        if not self.is_main:
            return None
        return (last_json_line(self.path / "attempts.jsonl") or {"attempt": 0})["attempt"] + 1

    @_on_disk
    def start_attempt(
        self,
        *,
        world_size: int,
        resumed_step: int | None = None,
        of_another: bool = False,
        command: list[str] | None = None,
    ) -> int | None:
        """Record this start of the run, clear the markers, cut the records back. Returns its number, from 1.

        ``resumed_step`` is the checkpoint's step, None for a fresh start; where the checkpoint is ``of_another`` run,
        no record here is one of the steps before it. Call it once it is settled that
        there is something left to train, for DONE goes too: a continued run is not done. The number is on the
        disk before this returns; off the main rank the answer is None, and the caller broadcasts it.
        """
        if not self.is_main:
            return None
        path, attempt = self.path / "attempts.jsonl", self.next_attempt()
        record = {"attempt": attempt, "time": now(), "world_size": world_size, "resumed_step": resumed_step}
        attempts = JsonLines(path)
        attempts.append({**record, "command": list(sys.argv) if command is None else command})
        attempts.sync()
        attempts.close()
        for marker in (self.path / "INTERRUPTED", self.path / "DONE"):
            remove_file(marker)
        self.truncate(-1 if resumed_step is None or of_another else resumed_step)
        return attempt

    @_on_disk
    def append(self, name: str, record: dict) -> None:
        """One line of a file of ``RECORDS``; ``record["step"]`` counts finished steps, as checkpoints do."""
        if self.is_main:
            if name not in self._records:
                self._records[name] = JsonLines(self.path / name)
            self._records[name].append(record)

    def append_metrics(self, record: dict) -> None:
        """One line of ``metrics.jsonl``."""
        self.append(METRICS, record)

    @_on_disk
    def truncate(self, step: int) -> None:
        """Drop the records of later steps than ``step`` (and cut lines), atomically."""
        if not self.is_main:
            return
        self._close_records()
        for path in (self.path / name for name in RECORDS):
            if path.exists():
                kept = [record for record in read_json_lines(path) if _step_of(record, step) <= step]
                replace_file(path, "".join(to_json(record) + "\n" for record in kept))

    @_on_disk
    def flush(self) -> None:
        """Records so far are on the disk when this returns: call it before a checkpoint is complete."""
        for record in self._records.values():
            record.sync()

    def close(self) -> None:
        """Close the files and give the directory free for another process; nothing where its disk is silent."""
        if not self.disk.gone:
            self._close()
            self.disk.rest()

    @_on_disk
    def _close(self):
        self._close_records()
        if self._lock is not None:
            self._lock.close()

    def _close_records(self):
        for record in self._records.values():
            record.close()
        self._records = {}

    def mark_done(self, step: int) -> None:
        """The run is finished: its schedule, or run.max_steps, ended with ``step`` finished steps."""
        self._mark("DONE", {"step": step, "time": now()}, instead_of="INTERRUPTED")

    def mark_interrupted(self, step: int, reason: str) -> None:
        """The run stopped after the complete checkpoint of ``step``; ``reason``: a signal's name or what else asked."""
        self._mark("INTERRUPTED", {"step": step, "reason": reason, "time": now()})

    @_on_disk
    def _mark(self, name, record, instead_of=None):
        if self.is_main:
            self.flush()
            if instead_of:  # where a shorter schedule is asked for than it was stopped in
                remove_file(self.path / instead_of)
            replace_file(self.path / name, to_json(record) + "\n")

    def done_step(self) -> int | None:
        """The final step that DONE records, or None where the run is not done. Any rank may ask."""
        return self._marked_step("DONE")

    def interrupted_step(self) -> int | None:
        """The step that INTERRUPTED records, or None where the run was not stopped. Any rank may ask."""
        return self._marked_step("INTERRUPTED")

    @_on_disk
    def _marked_step(self, marker):
        try:
            with open_ordinary(self.path / marker, "rb") as file:
                return int(json.loads(file.read(1 << 16))["step"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path / marker} does not record a step; delete it to continue the run"
            ) from error
