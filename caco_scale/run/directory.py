"""The run directory: what a run leaves on disk (how it is written: :mod:`caco_scale.run.files`).

config.yaml  environment.json  attempts.jsonl  metrics.jsonl
checkpoints/  tensorboard/  DONE | INTERRUPTED
"""

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self

from caco_scale.errors import UserError
from caco_scale.run.files import JsonLines, last_json_line, read_json_lines, replace_file, to_json
from caco_scale.run.lock import be_alone


def _now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_place(path: str | Path) -> str:
    """Whether a run directory can be made and written -> where it is, with its disk's free space.

    Raises:
        UserError: it cannot.
    """
    path = Path(path).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir {path} cannot be written ({existing}): correct its rights, or give another --run.dir"
        )
    return f"run.dir {path}, {shutil.disk_usage(existing).free / 1e9:,.0f} GB free"


class RunDirectory:
    """One run's directory. Only the main rank writes; on the others every writing method does nothing.

    Use it as a context: leaving it closes the files and gives the directory free.

    Raises :class:`UserError` where the place cannot be created or written (a file in the way, no right, a
    full disk).
    """

    def __init__(self, path: str | Path, is_main: bool):
        self.path = Path(path)
        self.is_main = is_main
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self._metrics_file: JsonLines | None = None
        self._lock: IO | None = None
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_config(self, text: str) -> None:
        if self.is_main:
            replace_file(self.path / "config.yaml", text)

    def write_environment(self, environment: dict) -> None:
        if self.is_main:
            replace_file(self.path / "environment.json", to_json(environment, indent=2) + "\n")

    def next_attempt(self) -> int | None:
        """The number that :meth:`start_attempt` will give; None off the main rank."""
        if not self.is_main:
            return None
        return (last_json_line(self.path / "attempts.jsonl") or {"attempt": 0})["attempt"] + 1

    def start_attempt(
        self, *, world_size: int, resumed_step: int | None = None, command: list[str] | None = None
    ) -> int | None:
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

    def append_metrics(self, record: dict) -> None:
        """One line of ``metrics.jsonl``; ``record["step"]`` counts finished steps, as checkpoints do."""
        if self.is_main:
            if self._metrics_file is None:
                self._metrics_file = JsonLines(self.metrics)
            self._metrics_file.append(record)

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of later steps than ``step`` (and cut lines), atomically."""
        if not self.is_main or not self.metrics.exists():
            return
        self._close_metrics()
        kept = [record for record in read_json_lines(self.metrics) if record.get("step", step) <= step]
        replace_file(self.metrics, "".join(to_json(record) + "\n" for record in kept))

    def flush(self) -> None:
        """Metrics so far are on the disk when this returns: call it before a checkpoint is complete."""
        if self._metrics_file is not None:
            self._metrics_file.sync()

    def close(self) -> None:
        """Close the files and give the directory free for another process."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()

    def _close_metrics(self):
        if self._metrics_file is not None:
            self._metrics_file.close()
            self._metrics_file = None

    def mark_done(self, step: int) -> None:
        """The run is finished: its schedule, or run.max_steps, ended with ``step`` finished steps."""
        self._mark("DONE", {"step": step, "time": _now()})

    def mark_interrupted(self, step: int, reason: str) -> None:
        """The run stopped after the complete checkpoint of ``step``; ``reason``: a signal's name or what else asked."""
        self._mark("INTERRUPTED", {"step": step, "reason": reason, "time": _now()})

    def _mark(self, name, record):
        if self.is_main:
            self.flush()
            replace_file(self.path / name, to_json(record) + "\n")

    def done_step(self) -> int | None:
        """The final step that DONE records, or None where the run is not done. Any rank may ask."""
        return self._marked_step("DONE")

    def interrupted_step(self) -> int | None:
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
