"""What a run left on disk, read for people: curves as arrays, incidents as lines, status in words.

Reading changes nothing in the run's directory and needs no process group; a run that still trains can be read.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from caco_scale import config as configuration
from caco_scale.checkpoint.folder import latest
from caco_scale.errors import UserError
from caco_scale.run.alarm import CollapseAlarm, collapse_warning
from caco_scale.run.files import read_json_lines
from caco_scale.run.lock import is_held

MAX_RUNS = 6  # side by side: as many colours as can be told apart
SHOWN_SKIPS = 20  # in a row of incidents, before they are only counted
SHOWN_CORRUPT = 20


@dataclass(frozen=True)
class Series:
    """A figure over time: ``step`` (n,) finished steps, ascending, ``value`` (n,), NaN for a gap."""

    step: np.ndarray
    value: np.ndarray

    def last(self) -> float | None:
        """The last finite value, or None."""
        finite = self.value[np.isfinite(self.value)]
        return float(finite[-1]) if len(finite) else None

    def last_step(self) -> int | None:
        """The step of the last finite value, or None."""
        finite = self.step[np.isfinite(self.value)]
        return int(finite[-1]) if len(finite) else None


@dataclass(frozen=True)
class Incident:
    """Something that a smooth run does not have: ``kind`` is resume, skip, corrupt, store, collapse, low or stop."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """One run's records. ``checkpoint``: path of the newest complete one, or None."""

    path: Path
    name: str
    config: configuration.Config
    environment: dict
    attempts: list[dict]
    metrics: list[dict]
    corrupt: list[dict]
    done: dict | None
    interrupted: dict | None
    is_training: bool
    checkpoint: Path | None

    @cached_property
    def last_step(self) -> int:
        return max(record["step"] for record in self.metrics)

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """From the last line that has both, or None."""
        for record in reversed(self.metrics):
            if record["step"] and is_number(record.get("epoch")) and record["epoch"] > 0:
                return record["step"] / record["epoch"]
        return None

    @cached_property
    def _series(self):
        """Every figure's :class:`Series`, in order of appearance: one pass over lines that may be many."""
        columns: dict[str, tuple[list, list]] = {}
        for record in sorted(self.metrics, key=lambda record: record["step"]):
            for name, value in record.items():
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value if is_number(value) else math.nan)
        return {name: Series(*(np.array(part, float) for part in parts)) for name, parts in columns.items()}

    def figures(self) -> list[str]:
        """Names of all numeric figures in the metrics, in order of appearance."""
        skip = ("step", "epoch", "phase")
        return [n for n, s in self._series.items() if n not in skip and np.isfinite(s.value).any()]

    def series(self, name: str) -> Series:
        """The :class:`Series` of one figure; empty where the run does not have it."""
        return self._series.get(name) or Series(np.empty(0), np.empty(0))

    def warmup_end(self) -> int | None:
        """Step at which the bank warm-up was last logged, or None for a run without."""
        return max((r["step"] for r in self.metrics if r.get("phase") == "bank warm-up"), default=None)

    def status(self) -> tuple[str, str]:
        """(word, sentence): how the run stands."""
        if self.is_training:
            return "training", f"training now, {self.last_step:,} steps logged"
        if self.done:
            return "done", f"done after {_step_of(self.done, self.last_step):,} steps"
        if self.interrupted:
            step, reason = _step_of(self.interrupted, self.last_step), self.interrupted.get("reason", "?")
            return "stopped", f"stopped by {reason} after step {step:,}; the same command resumes it"
        return (
            "ended",
            f"no DONE and no INTERRUPTED: killed after step {self.last_step:,}; the same command resumes it",
        )


def is_number(value: Any) -> bool:
    """Is it a finite number that a float can hold? JSON in Python knows NaN and integers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def count(number: float, what: str, plural: str = "s") -> str:
    """So many of something, in words."""
    return f"{number:,} {what}{plural * (number != 1)}"


def _step_of(record, unknown=0, name="step"):
    """The step that a record names, or ``unknown``."""
    return int(record[name]) if is_number(record.get(name)) else unknown


def read_run(path: str | Path) -> Run:
    """The :class:`Run` in a directory. UserError: no run there, damaged config, no metrics yet."""
    path = Path(path)
    if not os.path.exists(path):  # False, too, for a name that no file can have
        raise UserError(f"no run at {path}: give a run directory, such as runs/demo")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give a run directory, such as runs/demo")
    if (path / "values.json").exists():
        raise UserError(f"{path} is a checkpoint: give its run directory, {path.absolute().parent.parent}")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run directory: it has no config.yaml")
    try:
        config = configuration.load_recipe(path / "config.yaml")
        configuration.check(config)
        metrics = [_measured(r) for r in read_json_lines(path / "metrics.jsonl") if _has_step(r)]
        attempts = [r for r in read_json_lines(path / "attempts.jsonl") if is_number(r.get("attempt"))]
        # Each image once: before 0.2 a resumed run repeated the lines after its checkpoint.
        found = {str(r.get("key")): r for r in read_json_lines(path / "corrupt.jsonl")}
        corrupt = list(found.values())
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if not any(is_number(record.get("loss")) for record in metrics):
        every = config.run.log_every
        when = (
            f"a run writes its first line after {every} steps (run.log_every)"
            if every
            else "run.log_every is 0"
        )
        raise UserError(f"{path} has no metrics to show, its metrics.jsonl holds no loss: {when}")
    return Run(
        path=path,
        name=path.absolute().name,
        config=config,
        environment=_json(path / "environment.json") or {},
        attempts=attempts,
        metrics=metrics,
        corrupt=corrupt,
        done=_json(path / "DONE"),
        interrupted=_json(path / "INTERRUPTED"),
        is_training=is_held(path / ".lock"),
        checkpoint=latest(path / "checkpoints"),
    )


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs of several directories, each with a name of its own: as much of the path as tells them apart."""
    runs = [read_run(path) for path in paths]
    parts = [run.path.absolute().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("a run is named twice: give each run directory once")
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return [replace(run, name="/".join(part[-depth:])) for run, part in zip(runs, parts, strict=True)]


def _has_step(record):
    return is_number(record.get("step")) and record["step"] >= 0


def _measured(record):
    """A line without the figures of the bank that nothing had measured: 0.1 wrote zeros until then."""
    unmeasured = ("bank_rows_used", "bank_assignment_entropy") if record.get("bank_rows_used") == 0 else ()
    return {name: value for name, value in record.items() if name not in unmeasured} if unmeasured else record


def _json(path):
    """A small file's JSON object, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ----------------------------------------------------------------------------------------------------
# Incidents


def incidents(run: Run) -> list[Incident]:
    """What a smooth run does not have, in the order of steps -> list of :class:`Incident`."""
    found = [*_resumes(run), *_skips(run), *_corrupt(run), *_collapses(run), *_store_trouble(run)]
    if run.interrupted:
        found.append(Incident(_step_of(run.interrupted, run.last_step), "stop", run.status()[1]))
    elif not run.done and not run.is_training:
        found.append(Incident(run.last_step, "stop", run.status()[1]))
    return sorted(found, key=lambda incident: incident.step)


def _resumes(run):
    before = None
    for attempt in run.attempts:
        processes = attempt.get("world_size")
        when = str(attempt.get("time", "at an unknown time")).replace("T", " ").replace("+00:00", " UTC")
        resumed = is_number(attempt.get("resumed_step"))
        step = _step_of(attempt, name="resumed_step")
        if before is not None:
            world = count(processes, "process", "es") if is_number(processes) else "processes unknown"
            if processes != before.get("world_size"):
                world += f" after {before.get('world_size')}"
            where = f"resumed from the checkpoint of step {step:,}" if resumed else "began afresh"
            yield Incident(step, "resume", f"start {attempt['attempt']} {where}, {when}, {world}")
        elif resumed:
            yield Incident(step, "resume", f"began with another run's checkpoint of step {step:,}, {when}")
        before = attempt


def _skips(run):
    skipped = [record["step"] for record in run.metrics if is_number(record.get("skipped_step"))]
    for step in skipped[:SHOWN_SKIPS]:
        yield Incident(int(step), "skip", "loss or gradient not finite: the step changed nothing")
    if len(skipped) > SHOWN_SKIPS:
        yield Incident(int(skipped[-1]), "skip", f"{len(skipped):,} steps in all were not finite")


def _corrupt(run):
    for entry in run.corrupt[:SHOWN_CORRUPT]:
        key, error, substitute = (entry.get(name, "?") for name in ("key", "error", "substitute"))
        yield Incident(
            _step_of(entry), "corrupt", f"{key} does not decode ({error}); trained on {substitute}"
        )
    if len(run.corrupt) > SHOWN_CORRUPT:
        text = f"{len(run.corrupt):,} images in all do not decode: corrupt.jsonl"
        yield Incident(_step_of(run.corrupt[-1]), "corrupt", text)


def _collapses(run):
    """The collapse alarm, sounded again on the logged figures."""
    width = run.config.model.embedding_dim
    most = run.config.data.global_batch_size
    alarm, low = (
        CollapseAlarm(width, max_rank=most),
        [],
    )  # low: steps in a row below a drawn line, no alarm yet
    for record in [r for r in run.metrics if is_number(r.get("embedding_std"))] + [{}]:
        std, rankme = record.get("embedding_std"), record.get("rankme")
        rankme = rankme if is_number(rankme) else None
        if record and (warning := alarm.check(std, rankme)):
            yield Incident(_step_of(record), "collapse", re.sub(r"\. Try .*", "", warning))
            low = []
        elif record and not alarm.is_raised and collapse_warning(std, width, rankme, max_rank=most):
            low.append(_step_of(record))
        elif low:
            lines = f"{count(len(low), 'logged line')} below the alarm's"
            yield Incident(
                low[0], "low", f"{lines}, to step {low[-1]:,}: it sounds after {alarm.patience} in a row"
            )
            low = []


def _store_trouble(run):
    """What the object store made necessary; the counters begin anew at every start."""
    for name, words in (("data_retries", "reads tried again"), ("data_damaged", "damaged downloads")):
        series = run.series(name)
        finite = np.nan_to_num(series.value)
        if not finite.any():
            continue
        # A total smaller than the one before belongs to a new start.
        ends = np.flatnonzero(np.append(finite[1:] < finite[:-1], True))
        total = int(sum(finite[end] for end in ends))
        first = int(series.step[np.flatnonzero(finite)[0]])
        yield Incident(first, "store", f"object store: {total:,} {words} by step {int(series.step[-1]):,}")
