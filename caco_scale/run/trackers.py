"""Experiment trackers beside TensorBoard, by accelerate's own classes: W&B, MLflow and others.

**A tracker holds what metrics.jsonl holds.** When a run goes on, a tracker is first given all figures that it lacks up
to the step of the checkpoint, and later none twice: no gap and no double after ``kill -9``, nor where it had failed, or
was added, in between. trackers.json in the run directory keeps its id of the run. A fresh start is a new run there.

    wandb      offline in run.dir/wandb. A resume writes a new folder, whole, with the run's id, and removes the older
               one: ``wandb sync`` replaces the run of that id. With WANDB_MODE=online the same run goes on after the
               last step that it has; W&B drops what comes for an older one
    mlflow     files in run.dir/mlruns; with MLFLOW_TRACKING_URI that store. The same run goes on. It can neither change
               nor remove: steps above the checkpoint's that it has keep their values, parameters those of the start
    comet_ml   offline in run.dir/comet, with COMET_START_ONLINE as "others". A resume writes the archive of that key
               again, whole; Comet writes it at a start's end, so a killed one has left none
    trackio    where Trackio keeps all runs (TRACKIO_DIR): its dashboard compares them. A resume removes the run there
               and writes it again, whole, by the same name; with TRACKIO_SPACE_ID or TRACKIO_SERVER_URL as "others"
    others     as they are set up; those registered with accelerate, too. Every start is a new run there, whole

Only the main rank has any. All of a tracker runs in a thread of its own (MLflow's run belongs to one) that training
waits for, ``SECONDS`` at most: one that fails or is silent is warned of once and left until the next start.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from caco_scale.errors import Hung, UserError, one_line, one_of, quoted
from caco_scale.run.directory import RunDirectory
from caco_scale.run.files import last_json_line, read_json_lines, remove_file, replace_file, to_json
from caco_scale.run.patience import Patience

PROJECT = "caco_scale"
FILE = "trackers.json"  # in the run directory: {name of a tracker: its id of the run}
SECONDS = 60.0  # that a tracker may take for one thing
START_SECONDS = 240.0  # beside them to start: its import, its server


def numbers_of(record: Mapping[str, Any]) -> dict[str, int | float]:
    """What of a record of metrics.jsonl is a number, as TensorBoard and trackers show it; its step is none."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def wanted(names: Sequence[str]) -> list[str]:
    """``run.trackers`` without what stands for nothing, and without TensorBoard, which is written in any case."""
    return [name for name in dict.fromkeys(names) if name not in ("", "none", "tensorboard")]


def check_trackers(names: Sequence[str]) -> None:
    """Whether accelerate has these trackers and their packages are installed, by name: nothing is imported.

    Raises:
        UserError: it does not, or they are not.
    """
    absent = {str(kind) for kind in LoggerType} - {str(kind) for kind in get_available_trackers()}
    for name in wanted(names):
        one_of(name, LOGGER_TYPE_TO_CLASS, "tracker in run.trackers")
        if name in absent:
            raise UserError(f"run.trackers {name}: its package is not installed: pip install {name}")


class _Tracker:
    """How one of accelerate's trackers is started. This one knows no run of before: every start is a new run there.

    ``identity``: its id of the run, None where there is none yet.
    """

    def __init__(self, run: Path, identity: str | None):
        self.run, self.identity, self.goes_on = run, identity, identity is not None
        self.title = run.absolute().name

    def prepare(self) -> None:
        """What comes before its start."""

    def project(self) -> str:
        return PROJECT

    def options(self) -> dict[str, Any]:
        """Keyword arguments of accelerate's class."""
        return {}

    def started(self, run: Any) -> None:
        """Notes what there is of it; ``run`` is the tracker's own object."""

    def lacks(self, name: str, step: int) -> bool:
        """Whether a figure of a step is not there yet."""
        return True

    def new_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Those that it still takes."""
        return settings

    def whole(self) -> None:
        """It has all up to the step that the run goes on from."""

    def where(self) -> str:
        """Where to look, for people."""
        return ""

    def end(self) -> None:
        """What comes after its end."""


class _Wandb(_Tracker):
    def __init__(self, run, identity):
        super().__init__(run, os.environ.get("WANDB_RUN_ID") or identity)
        self.mode = os.environ.get("WANDB_MODE", "offline")
        self.is_offline = self.mode in ("offline", "dryrun")
        self.first, self.folder = 0, Path()

    def project(self):
        return os.environ.get("WANDB_PROJECT", PROJECT)

    def options(self):
        self.identity = self.identity or uuid4().hex[:8]
        options: dict[str, Any] = {"id": self.identity, "mode": self.mode}
        options["name"] = os.environ.get("WANDB_NAME", self.title)
        options["dir"] = os.environ.get("WANDB_DIR", str(self.run))
        if "WANDB_CONSOLE" not in os.environ:
            options["settings"] = {"console": "off"}  # it would catch what the run prints, its bar included
        if not self.is_offline:
            options["resume"] = "allow"
        return options

    def started(self, run):
        self.first, self.folder = run.step, Path(run.dir).parent

    def lacks(self, name, step):
        return step >= self.first  # 0 of a new run, and offline

    def whole(self):
        if self.is_offline:
            for older in self.folder.parent.glob(f"offline-run-*-{self.identity}"):
                if older != self.folder:
                    shutil.rmtree(older, ignore_errors=True)

    def where(self):
        return f"wandb sync {quoted(self.folder)}" if self.is_offline else ""


class _MLflow(_Tracker):
    def prepare(self):
        self.set: dict[str, str] = {}
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return
        # In the environment: MLflow writes it there itself. From 3.13 on it refuses files unless it is told.
        self.set = {"MLFLOW_TRACKING_URI": (self.run / "mlruns").absolute().as_uri()}
        if "MLFLOW_ALLOW_FILE_STORE" not in os.environ:
            self.set["MLFLOW_ALLOW_FILE_STORE"] = "true"
        os.environ.update(self.set)

    def options(self):
        return {"run_id": self.identity, "run_name": self.title}

    def started(self, run):
        self.identity, self.client = run.info.run_id, import_module("mlflow").MlflowClient()
        self.steps = cache(lambda name: {m.step for m in self.client.get_metric_history(self.identity, name)})

    def lacks(self, name, step):
        return not self.goes_on or step not in self.steps(name)

    def new_settings(self, settings):
        known = self.client.get_run(self.identity).data.params if self.goes_on else {}
        return {name: value for name, value in settings.items() if name not in known}

    def where(self):
        command = f"mlflow ui --backend-store-uri {quoted(self.run / 'mlruns')}"
        return f"MLFLOW_ALLOW_FILE_STORE=true {command}" if self.set else ""

    def end(self):
        for name in self.set:
            os.environ.pop(name, None)


class _Comet(_Tracker):
    def options(self):
        config = import_module("comet_ml").ExperimentConfig
        once: dict[str, Any] = {"auto_metric_logging": False}  # else it takes TensorBoard's figures, too
        if os.environ.get("COMET_START_ONLINE"):
            return {"experiment_config": config(**once)}
        self.identity = self.identity or uuid4().hex
        once |= {"offline_directory": str(self.run / "comet"), "name": self.title, "display_summary_level": 0}
        return {
            "online": False,
            "experiment_key": self.identity,
            "mode": "create",
            "experiment_config": config(**once),
        }

    def project(self):
        return os.environ.get("COMET_PROJECT_NAME", PROJECT)


class _ClearML(_Tracker):
    def options(self):
        return {"auto_connect_frameworks": {"tensorboard": False}}  # else it has all figures twice


class _Trackio(_Tracker):
    def options(self):
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            self.identity = None
            return {}
        for older in import_module("trackio").Api().runs(PROJECT) if self.identity else ():
            if older.name == self.identity:
                older.delete()
        self.identity = self.identity or f"{self.title}-{uuid4().hex[:8]}"
        return {"name": self.identity}

    def where(self):
        return f"trackio show --project {PROJECT}" if self.identity else ""


KINDS: dict[str, type[_Tracker]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "comet_ml": _Comet,
    "clearml": _ClearML,
    "trackio": _Trackio,
}


class _Failed(Exception):
    """Whatever a tracker has raised."""


class _Running:
    """A tracker of accelerate's (``own``), and the thread that does all of it."""

    def __init__(self, name: str, kind: _Tracker):
        self.name, self.kind = name, kind
        self.own: Any = None
        # The last step of every figure: two lines of a step may both have its epoch.
        self._last: dict[str, int] = {}
        self._thread = Patience(f"tracker {name}", SECONDS)

    def start(self, settings: dict[str, Any]) -> None:
        self.kind.prepare()
        cls: Any = LOGGER_TYPE_TO_CLASS[self.name]
        folder = [str(self.kind.run)] if cls.requires_logging_directory else []
        self.own = cls(self.kind.project(), *folder, **self.kind.options())
        self.own.start()
        self.kind.started(self.own.tracker)
        self.own.store_init_configuration(self.kind.new_settings(settings))

    def log(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Those figures of a step that it lacks."""
        lacking = {
            name: value
            for name, value in numbers.items()
            if self._last.get(name) != step and self.kind.lacks(name, step)
        }
        if lacking:
            self.own.log(lacking, step=step)
            self._last |= dict.fromkeys(lacking, step)

    def do(self, function: Callable[[], object], more: float = 0) -> str | None:
        """Have its thread do something -> None, or why it has not. ``more``: seconds beside ``SECONDS``."""

        def guarded():
            try:
                function()
            except BaseException as error:  # a tracker may raise anything, SystemExit too
                raise _Failed(f"{type(error).__name__}: {one_line(error)}"[:300]) from error

        try:
            self._thread.call(guarded, more)
        except _Failed as error:
            return str(error)
        except Hung:
            return f"no answer for {SECONDS + more:g} seconds"
        return None

    def end(self) -> None:
        self.kind.end()
        self._thread.rest()


class Trackers:
    """The trackers of a run, started, and given what metrics.jsonl has. Off the main rank there are none.

    Args:
        names: ``run.trackers``, checked by :func:`check_trackers`.
        settings: the run's whole configuration, ``{"section.field": value}``.
        kept_step: that of the run's own checkpoint that it goes on from; None where it starts afresh.
    Attributes:
        notes, warnings: lines for people, about the start.
    Raises:
        UserError: one does not start. Where the run goes on that is a warning: a job that was requeued goes on.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: RunDirectory,
        settings: Mapping[str, Any],
        kept_step: int | None,
    ):
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._running: list[_Running] = []
        if not directory.is_main:
            return
        self._directory, self._names = directory, wanted(names)
        identities, records = directory.disk.call(lambda: self._left(kept_step))
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else to_json(value)
            for name, value in settings.items()
        }
        for name in self._names:
            one = _Running(name, KINDS.get(name, _Tracker)(directory.path, identities.get(name)))
            failure = one.do(partial(one.start, plain), START_SECONDS)
            if failure:
                one.end()
                self._not_started(name, failure, kept_step)
                continue
            self._running.append(one)
            if one.kind.identity:
                identities[name] = one.kind.identity
                text = to_json(identities) + "\n"
                directory.disk.call(partial(replace_file, directory.path / FILE, text))
            for step, numbers in records:
                self._all([one], lambda one, at=step, of=numbers: one.log(at, of))
            self._all([one], lambda one: one.kind.whole())
            which = f"run {one.kind.identity}" if one.kind.identity else "a new run"
            if not one.kind.identity and kept_step is not None:
                which += ", whole: it cannot go on in that of before"
            self.notes.append(", ".join(filter(None, (f"tracker {name}: {which}", one.kind.where()))))

    def _left(self, kept_step):
        """What earlier starts have left: the run's ids, and the (step, figures) of metrics.jsonl up to a step."""
        path = self._directory.path / FILE
        if kept_step is None:
            remove_file(path)
            return {}, []
        records = read_json_lines(self._directory.metrics) if self._names else ()
        kept = [r for r in records if isinstance(r.get("step"), int) and r["step"] <= kept_step]
        return last_json_line(path) or {}, [(r["step"], numbers_of(r)) for r in kept]

    def _not_started(self, name, failure, kept_step):
        others = " ".join(other for other in self._names if other != name) or "none"
        text = f"tracker {name} does not start ({failure})"
        if kept_step is None:
            raise UserError(f"{text}: put that right, or leave it out with --run.trackers {others}")
        self.warnings.append(f"{text}: this start goes on without it; the next one gives it what it lacks")

    def log(self, step: int, numbers: Mapping[str, int | float]) -> list[str]:
        """The figures of a finished step -> the warnings that there are since the last time."""
        self._all(self._running, lambda one: one.log(step, numbers))
        return self.take_warnings()

    def finish(self) -> list[str]:
        """End them all -> warnings, as of :meth:`log`."""
        self._all(self._running, lambda one: one.own.finish())
        for one in self._running:
            one.end()
        self._running = []
        return self.take_warnings()

    def take_warnings(self) -> list[str]:
        """The warnings so far; they are not given again."""
        found, self.warnings = self.warnings, []
        return found

    def _all(self, ones: Iterable[_Running], function: Callable[[_Running], object]) -> None:
        """Have trackers do something; one that fails is warned of, and left."""
        for one in [one for one in ones if one in self._running]:
            failure = one.do(partial(function, one))
            if failure:
                self._running = [other for other in self._running if other is not one]
                one.end()
                self.warnings.append(
                    f"tracker {one.name} is left ({failure}): training and metrics.jsonl go on, and the next start "
                    "gives it what it lacks"
                )
