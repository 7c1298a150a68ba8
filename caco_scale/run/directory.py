"""The run directory: what a run leaves on disk, written so that ``kill -9`` at any moment leaves it readable.

    config.yaml  environment.json  attempts.jsonl  metrics.jsonl
    checkpoints/  tensorboard/  DONE | INTERRUPTED

Two kinds of writing, no others. Small whole files (configuration, environment, markers) are replaced
atomically: temporary file, fsync, rename. Files that grow are JSON lines, every line handed to the kernel by
one write at once, so that a killed process loses nothing it appended; :meth:`JsonLines.sync` makes the lines
survive a machine that dies. NaN and infinities are written as ``null``: JSON has no word for them, and a plot
shows the gap.
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from caco_scale.atomic import write_atomically
from caco_scale.errors import UserError

LOCK_SECONDS = 10

RECORDED_PACKAGES = (
    "caco_scale",
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "webdataset",
    "numpy",
    "simplejpeg",
)


def to_plain(value):
    """Plain Python for JSON: tensors and numpy become numbers and lists, NaN and infinities become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def to_json(value, **options):
    return json.dumps(to_plain(value), allow_nan=False, **options)


def _replace(path, text):
    """Replace a file by ``text``, atomically."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path, error):
    return UserError(
        f"cannot write {path}: {error.strerror}; free or fix that place and start the same command again"
    )


class JsonLines:
    """An append-only file of JSON objects, one a line.

    A line cut by a kill stays cut: the next writer starts on a line of its own, and readers skip the fragment
    (a cut object never parses, since only its last character closes it).
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115, open while the run lasts
            size = self._file.seek(0, os.SEEK_END)
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._write(b"\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def append(self, record):
        try:
            self._write(to_json(record).encode() + b"\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _write(self, line):
        while line:
            line = line[self._file.write(line) :]

    def sync(self):
        """Return only when every line appended so far is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self):
        self._file.close()


def _parse(line):
    """The object of one line, or None where the line was cut."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_json_lines(path):
    """Yield the objects of a JSON-lines file in order; cut lines are skipped, a missing file has none."""
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def last_json_line(path):
    """The last whole object of a JSON-lines file, or None; reads only the end of a long file."""
    if not Path(path).exists():
        return None
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = 1 << 16
        while True:
            start = max(0, size - tail)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")
            for line in reversed(lines[1 if start else 0 :]):
                record = _parse(line)
                if record is not None:
                    return record
            if start == 0:
                return None
            tail *= 8


def git_commit(folder):
    """The commit of the checkout that tracks the package, ``+changes`` if edited; None if there is none."""

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        # An installed package in a virtual environment within some checkout has no commit of its own.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(*, world_size, devices, hosts, **more):
    """What ``environment.json`` holds: versions, commit, command line, and the facts that are passed in.

    ``devices`` and ``hosts`` are lists with one entry per rank, in rank order; gathering them is the caller's
    part.
    """
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "git_commit": git_commit(Path(__file__).parents[1]),
        "command": list(sys.argv),
        "platform": platform.platform(),
        "world_size": world_size,
        "devices": list(devices),
        "hosts": list(hosts),
        **more,
    }


def _now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def be_alone(lock, complaint):
    """Hold the lock of an open file until this process ends, however: two in one folder would undo each other's work.

    Raises UserError (``complaint``) where another process holds it, after a while: one that was just killed may linger.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(complaint) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return None


class RunDirectory:
    """One run's directory. Only the main rank writes; on the others every writing method does nothing.

    Raises :class:`UserError` where the place cannot be created or written (a file in the way, no right, a
    full disk).
    """

    def __init__(self, path, is_main):
        self.path = Path(path)
        self.is_main = is_main
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self._metrics_file = self._lock = None
        if is_main:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self._lock = open(self.path / ".lock", "a")  # noqa: SIM115, held as long as the run
            except OSError as error:
                raise UserError(
                    f"cannot create the run directory {self.path}: {error.strerror}; "
                    "name another place with run.dir"
                ) from error
            be_alone(
                self._lock,
                f"{self.path} is in use by another running process: end that one, or give another run.dir",
            )

    def write_config(self, text):
        if self.is_main:
            _replace(self.path / "config.yaml", text)

    def write_environment(self, environment):
        if self.is_main:
            _replace(self.path / "environment.json", to_json(environment, indent=2) + "\n")

    def next_attempt(self):
        """The number that :meth:`start_attempt` will give; None off the main rank."""
        if not self.is_main:
            return None
        return (last_json_line(self.path / "attempts.jsonl") or {"attempt": 0})["attempt"] + 1

    def start_attempt(self, *, world_size, resumed_step=None, command=None):
        """Record this start of the run, clear the markers, cut the metrics back. Returns its number, from 1.

        ``resumed_step`` is the checkpoint's step, None for a fresh start. Call it once it is settled that
        there is something left to train, for DONE goes too: a continued run is not done. The number is on the
        disk before this returns; off the main rank the answer is None, and the caller broadcasts it.
        """
        if not self.is_main:
            return None
        path, attempt = self.path / "attempts.jsonl", self.next_attempt()
        record = {"attempt": attempt, "time": _now(), "world_size": world_size, "resumed_step": resumed_step}
        attempts = JsonLines(path)
        attempts.append({**record, "command": list(sys.argv) if command is None else command})
        attempts.sync()
        attempts.close()
        for marker in ("INTERRUPTED", "DONE"):
            (self.path / marker).unlink(missing_ok=True)
        self.truncate_metrics(-1 if resumed_step is None else resumed_step)
        return attempt

    def append_metrics(self, record):
        """One line of ``metrics.jsonl``; ``record["step"]`` counts finished steps, as checkpoints do."""
        if self.is_main:
            if self._metrics_file is None:
                self._metrics_file = JsonLines(self.metrics)
            self._metrics_file.append(record)

    def truncate_metrics(self, step):
        """Drop the lines of later steps than ``step`` (and cut lines), atomically."""
        if not self.is_main or not self.metrics.exists():
            return
        self._close_metrics()
        kept = [record for record in read_json_lines(self.metrics) if record.get("step", step) <= step]
        _replace(self.metrics, "".join(to_json(record) + "\n" for record in kept))

    def flush(self):
        """Metrics so far are on the disk when this returns: call it before a checkpoint is complete."""
        if self._metrics_file is not None:
            self._metrics_file.sync()

    def close(self):
        """Close the files and give the directory free for another process."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()

    def _close_metrics(self):
        if self._metrics_file is not None:
            self._metrics_file.close()
            self._metrics_file = None

    def mark_done(self, step):
        """The run is finished: its schedule, or run.max_steps, ended with ``step`` finished steps."""
        self._mark("DONE", {"step": step, "time": _now()})

    def mark_interrupted(self, step, reason):
        """The run stopped after the complete checkpoint of ``step``; ``reason``: a signal's name or what else asked."""
        self._mark("INTERRUPTED", {"step": step, "reason": reason, "time": _now()})

    def _mark(self, name, record):
        if self.is_main:
            self.flush()
            _replace(self.path / name, to_json(record) + "\n")

    def done_step(self):
        """The final step that DONE records, or None where the run is not done. Any rank may ask."""
        return self._marked_step("DONE")

    def interrupted_step(self):
        """The step that INTERRUPTED records, or None where the run was not stopped. Any rank may ask."""
        return self._marked_step("INTERRUPTED")

    def _marked_step(self, marker):
        try:
            return int(json.loads((self.path / marker).read_text())["step"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path / marker} does not record a step; delete it to continue the run"
            ) from error
