"""Trackers of accelerate's: the figures of metrics.jsonl, no gap and no double after a kill, and none stops a run.

W&B and MLflow are played by small stand-ins of their packages, below accelerate's own classes.
"""

import io
import json
import os
import sys
import threading
import types
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, tracking
from accelerate.tracking import GeneralTracker
from launch import SMALL, finished, kill_when, progress, start_command
from shard_sets import make_shard_set

from caco_scale.config import load_recipe, parse, replace
from caco_scale.errors import UserError
from caco_scale.run import trackers
from caco_scale.run.directory import RunDirectory
from caco_scale.run.telemetry import Telemetry
from caco_scale.run.trackers import Trackers, check_trackers
from caco_scale.training import checks

SETTINGS = {"bank.size": 20, "views.scale": (0.2, 1.0), "recipe": "demo", "optim.lr": 0.1}


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    """No variable of a user's tracker, and nothing of accelerate's that the next test would find."""
    for name in [
        name for name in os.environ if name.split("_")[0] in ("WANDB", "MLFLOW", "COMET", "TRACKIO")
    ]:
        monkeypatch.delenv(name)
    was_there = bool(PartialState._shared_state)
    PartialState(cpu=True)  # a run has one; accelerate's classes ask it
    yield
    if not was_there:
        PartialState._reset_state()


class Fake(GeneralTracker):
    """One that knows no run of before: a list of ``(step, figures)`` for every start."""

    name, requires_logging_directory = "fake", True
    starts: list["Fake"]

    def __init__(self, project, folder, **_):
        super().__init__()
        self.project, self.folder = project, folder

    def start(self):
        self.logged, self.config, self.thread, self.ended = [], None, threading.get_ident(), False
        self.starts.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        assert threading.get_ident() == self.thread
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(Fake, "starts", [], raising=False)
    return Fake


def instead_of(package, stand_in):
    """A fixture: a new module of a class ``stand_in`` in a package's place."""

    @pytest.fixture
    def module(monkeypatch):
        found = stand_in()
        monkeypatch.setitem(sys.modules, package, found)
        return found

    return module


def start(path, names, kept_step=None, stream=None):
    """A start of a run: its directory, trackers and telemetry, as training opens them."""
    run = RunDirectory(path, is_main=True)
    found = Trackers(names, run, SETTINGS, kept_step)
    run.start_attempt(world_size=1, resumed_step=kept_step)
    options = {
        "total_steps": 100,
        "steps_per_epoch": 4,
        "images_per_step": 8,
        "stream": stream or io.StringIO(),
    }
    return Telemetry(run, start_step=kept_step or 0, trackers=found, **options)


def train(telemetry, first, last, value=1.0):
    """Steps with a loss each, and a kNN every fourth."""
    for step in range(first, last + 1):
        telemetry.log(step, {"loss": torch.tensor(value * step), "phase": "caco"})
        if step % 4 == 0:
            telemetry.log_event(step, {"epoch": step / 4, "knn_top1": 10.0 * step})


def killed(telemetry):
    """``kill -9``: nothing of it is ended but what goes with the process, its files and environment."""
    telemetry._run.close()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        os.environ.pop(name, None)


def test_a_name_is_one_of_accelerates_and_installed(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["mlflow"])
    check_trackers(["tensorboard", "none", "", "mlflow"])
    names = ", ".join(tracking.LOGGER_TYPE_TO_CLASS)
    with pytest.raises(
        UserError, match=rf"unknown tracker .*'wandbb' \(did you mean wandb\?\): give one of {names}$"
    ):
        check_trackers(["mlflow", "wandbb"])
    with pytest.raises(
        UserError, match=r"run\.trackers wandb: its package is not installed: pip install wandb$"
    ):
        check_trackers(["wandb"])
    config = replace(load_recipe("demo"), run__trackers=("wandb",))
    for rank, refused in ((0, True), (1, False)):  # the others have none
        one = checks.Start(config, "ddp", rank, 2, torch.device("cpu"))
        if refused:
            with pytest.raises(UserError, match="pip install wandb"):
                checks.check_run_trackers(one)
        else:
            checks.check_run_trackers(one)
    assert checks.check_run_trackers in checks.BEFORE_DATA


def test_names_are_given_as_words_or_as_a_list(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("run: {trackers: [wandb, mlflow]}")
    assert parse([str(recipe)]).run.trackers == ("wandb", "mlflow")
    assert parse([str(recipe), "--run.trackers", "none"]).run.trackers == ("none",)
    assert parse(["--run.trackers", "wandb", "mlflow", "demo"]).run.trackers == ("wandb", "mlflow")
    with pytest.raises(UserError, match=r"--run\.trackers has no value: give one or more words"):
        parse(["--run.trackers"])


def test_every_start_of_a_tracker_without_memory_is_whole(tmp_path, fake):
    telemetry = start(tmp_path, ["fake", "none", "tensorboard", "fake"])
    train(telemetry, 1, 7)
    killed(telemetry)
    stream = io.StringIO()
    with closing(start(tmp_path, ["fake"], kept_step=5, stream=stream)) as telemetry:
        train(telemetry, 6, 9)
    assert "tracker fake: a new run, whole: it cannot go on in that of before\n" in stream.getvalue()
    first, second = fake.starts
    assert (first.ended, second.ended) == (False, True)
    assert (second.project, second.folder) == ("caco_scale", str(tmp_path))
    assert second.config == {**SETTINGS, "views.scale": "[0.2, 1.0]"}
    losses = [(step, of["loss"]) for step, of in second.logged if "loss" in of]
    assert losses == [(step, float(step)) for step in range(1, 10)]
    assert [(step, of["knn_top1"]) for step, of in second.logged if "knn_top1" in of] == [
        (4, 40.0),
        (8, 80.0),
    ]
    epochs = [step for step, of in second.logged if "epoch" in of]
    assert epochs == list(range(1, 10))  # once a step, though a kNN's line has it again
    assert not {"step", "time", "phase"} & {name for _, of in second.logged for name in of}


def test_one_that_fails_is_warned_of_once_and_left(tmp_path, fake, monkeypatch):
    class Broken(Fake):
        def log(self, values, step=None, **_):
            if step == 3:
                sys.exit("out of\n  credit")
            super().log(values, step)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "broken", Broken)
    stream = io.StringIO()
    with closing(start(tmp_path, ["broken", "fake"], stream=stream)) as telemetry:
        train(telemetry, 1, 6)
    broken, other = fake.starts
    assert [step for step, of in broken.logged if "loss" in of] == [1, 2]
    assert [step for step, of in other.logged if "loss" in of] == [1, 2, 3, 4, 5, 6]
    assert (broken.ended, other.ended) == (False, True)
    (warning,) = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert "tracker broken is left (SystemExit: out of credit): training and metrics.jsonl go on" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_one_that_does_not_answer_is_left(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(trackers, "SECONDS", 0.3)
    over = threading.Event()
    monkeypatch.setattr(Fake, "log", lambda self, values, step=None: over.wait(60))
    stream = io.StringIO()
    with closing(start(tmp_path, ["fake"], stream=stream)) as telemetry:
        train(telemetry, 1, 3)
    over.set()
    assert stream.getvalue().count("tracker fake is left (no answer for 0.3 seconds)") == 1


def test_one_that_does_not_start_is_an_error_of_a_fresh_start_alone(tmp_path, fake, monkeypatch):
    class Absent(Fake):
        def start(self):
            raise ConnectionError("no server")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "absent", Absent)
    run = RunDirectory(tmp_path, is_main=True)
    wrong = r"tracker absent does not start \(ConnectionError: no server\): .* with --run.trackers fake$"
    with pytest.raises(UserError, match=wrong):
        Trackers(["absent", "fake"], run, SETTINGS, None)
    run.close()
    stream = io.StringIO()
    with closing(start(tmp_path, ["absent", "fake"], kept_step=2, stream=stream)) as telemetry:
        train(telemetry, 3, 4)
    assert stream.getvalue().count("warning: tracker absent does not start (ConnectionError: no server)") == 1
    assert [step for step, of in fake.starts[-1].logged if "loss" in of] == [3, 4]


def test_other_ranks_have_none(tmp_path, fake):
    found = Trackers(["fake"], RunDirectory(tmp_path / "run", is_main=False), SETTINGS, None)
    assert found.log(1, {"loss": 1.0}) == found.finish() == fake.starts == []


TRAINING = """
import json, os, sys
from accelerate import tracking
import caco_scale

class Lines(tracking.GeneralTracker):
    name, requires_logging_directory, tracker = "lines", True, None
    def __init__(self, project, folder):
        super().__init__()
        self.folder = folder
    def start(self):
        self.file = open(os.path.join(self.folder, f"lines-{os.getpid()}"), "w", buffering=1)
    def store_init_configuration(self, values):
        print(json.dumps(values), file=self.file)
    def log(self, values, step=None):
        print(json.dumps({"step": step, **values}), file=self.file)

tracking.LOGGER_TYPE_TO_CLASS["lines"] = Lines
flags = json.loads(sys.argv[1])
caco_scale.pretrain("demo", **flags)
"""


def test_a_run_that_was_killed_trains_on_with_its_tracker_whole(tmp_path):
    shards, run = make_shard_set(tmp_path / "set", num_images=96, samples_per_shard=20), tmp_path / "run"
    flags = {**SMALL, "data.shards": str(shards), "data.val_shards": str(shards), "run.dir": str(run)}
    flags |= {
        "run.trackers": ["lines"],
        "run.save_every": 4,
        "eval.knn_every": 2,
        "optim.epochs": 3,
        "run.max_steps": 0,
    }
    words = [sys.executable, "-c", TRAINING, json.dumps(flags)]
    process = start_command(words)
    kill_when(process, lambda: progress(run)[1] > 5 and any(run.glob("checkpoints/step_*")))
    (killed_one,) = run.glob("lines-*")
    done = finished(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    (resumed_one,) = set(run.glob("lines-*")) - {killed_one}
    settings, *logged = [json.loads(line) for line in resumed_one.read_text().splitlines()]
    assert settings["bank.size"] == 20
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "knn_top1"):
        expected = [(record["step"], record[name]) for record in records if name in record]
        assert [(one["step"], one[name]) for one in logged if name in one] == expected
        assert expected


# ---- MLflow


class MLflow(types.ModuleType):
    """The part of MLflow that accelerate's class and ours use: stores by address, which only grow."""

    def __init__(self):
        super().__init__("mlflow")
        self.stores, self.active = {}, threading.local()
        limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = types.SimpleNamespace(validation=limits)
        self.MlflowClient = lambda: self

    @property
    def store(self):
        return self.stores.setdefault(os.environ["MLFLOW_TRACKING_URI"], {})

    def search_experiments(self, filter_string):
        return []

    def create_experiment(self, **_):
        return "0"

    def start_run(self, run_id=None, run_name=None, **_):
        if run_id is None:
            run_id = f"id{len(self.store)}"
            data = types.SimpleNamespace(params={}, metrics=[], name=run_name)
            info = types.SimpleNamespace(run_id=run_id)
            self.store[run_id] = types.SimpleNamespace(info=info, data=data)
        self.active.run = self.store[run_id]
        return self.active.run

    def log_params(self, params):
        known = self.active.run.data.params
        assert all(known.get(name, value) == value for name, value in params.items()), "cannot be changed"
        known.update(params)

    def log_metrics(self, metrics, step):
        self.active.run.data.metrics += [(name, step, value) for name, value in metrics.items()]

    def get_run(self, run_id):
        return self.store[run_id]

    def get_metric_history(self, run_id, name):
        metrics = self.store[run_id].data.metrics
        return [types.SimpleNamespace(step=step) for n, step, _ in metrics if n == name]

    def end_run(self):
        self.active.run = None


mlflow = instead_of("mlflow", MLflow)


def history(run, name):
    return [(step, value) for n, step, value in run.data.metrics if n == name]


def test_mlflow_goes_on_in_the_same_run(tmp_path, mlflow):
    telemetry = start(tmp_path, ["mlflow"])
    train(telemetry, 1, 7)
    killed(telemetry)
    ((address, store),) = mlflow.stores.items()
    assert address == (tmp_path / "mlruns").as_uri()
    (run,) = store.values()
    run.data.metrics = [one for one in run.data.metrics if one[1] != 4]  # its own loss: it is given again
    with closing(start(tmp_path, ["mlflow"], kept_step=5)) as telemetry:
        train(telemetry, 6, 9, value=3.0)
    assert list(store.values()) == [run]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "id0"}
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 5: 5.0, 6: 6.0, 7: 7.0, 4: 4.0, 8: 24.0, 9: 27.0}
    assert history(run, "loss") == list(losses.items())  # 6 and 7 as the killed attempt had them
    assert sorted(history(run, "knn_top1")) == [(4, 40.0), (8, 80.0)]
    assert sorted(step for step, _ in history(run, "epoch")) == list(range(1, 10))
    assert run.data.params["views.scale"] == "[0.2, 1.0]"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_mlflow_with_an_address_of_the_users(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    with closing(start(tmp_path, ["mlflow"])) as telemetry:
        train(telemetry, 1, 2)
    assert list(mlflow.stores) == ["http://host"]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://host"


def test_a_fresh_start_is_a_new_run_and_a_tracker_that_comes_later_is_whole(tmp_path, mlflow, fake):
    for _ in range(2):
        with closing(start(tmp_path, ["mlflow"])) as telemetry:
            train(telemetry, 1, 3)
    (store,) = mlflow.stores.values()
    assert [len(history(run, "loss")) for run in store.values()] == [3, 3]
    with closing(start(tmp_path, ["fake"], kept_step=3)) as telemetry:
        train(telemetry, 4, 4)
    with closing(start(tmp_path, ["fake", "mlflow"], kept_step=4)) as telemetry:
        train(telemetry, 5, 5)
    assert [step for step, of in fake.starts[0].logged if "loss" in of] == [1, 2, 3, 4]
    assert [len(history(run, "loss")) for run in store.values()] == [3, 5]


def test_comet_is_offline_and_its_archive_is_written_again(tmp_path, monkeypatch):
    module, starts = types.ModuleType("comet_ml"), []
    module.__version__, module.ExperimentConfig = "3.58.8", dict
    logged = lambda found: types.SimpleNamespace(
        log_parameters=lambda values: None,
        set_step=lambda step: None,
        log_metric=lambda name, value, step: found.append((name, step, value)),
        end=lambda: None,
    )
    module.start = lambda **options: starts.append((options, [])) or logged(starts[-1][1])
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    for kept_step, last in ((None, 3), (2, 4)):
        with closing(start(tmp_path, ["comet_ml"], kept_step)) as telemetry:
            train(telemetry, (kept_step or 0) + 1, last)
    (first, _), (second, found) = starts
    assert first == second
    assert (second["online"], second["mode"]) == (False, "create")
    assert second["experiment_config"]["offline_directory"] == str(tmp_path / "comet")
    assert second["experiment_config"]["auto_metric_logging"] is False  # of TensorBoard, all again
    assert [step for name, step, _ in found if name == "loss"] == [1, 2, 3, 4]


def test_clearml_does_not_take_tensorboards_figures_too(tmp_path, monkeypatch):
    """It would hold all twice; and every start is a new task there, whole, which is said."""
    module, tasks = types.ModuleType("clearml"), []

    class Task:
        current_task = staticmethod(lambda: None)

        @staticmethod
        def init(**options):
            rows = []
            report = lambda title, series, value, iteration: rows.append((title, iteration, value))
            logger = types.SimpleNamespace(report_scalar=report)
            tasks.append((options, rows))
            return types.SimpleNamespace(
                get_logger=lambda: logger, connect_configuration=lambda values: None, close=lambda: None
            )

    module.Task = Task
    monkeypatch.setitem(sys.modules, "clearml", module)
    stream = io.StringIO()
    for kept_step, last in ((None, 3), (2, 4)):
        with closing(start(tmp_path, ["clearml"], kept_step, stream=stream)) as telemetry:
            train(telemetry, (kept_step or 0) + 1, last)
    (_, _), (options, rows) = tasks
    assert options["auto_connect_frameworks"] == {"tensorboard": False}
    assert [step for title, step, _ in rows if title == "loss"] == [1, 2, 3, 4]
    assert "tracker clearml: a new run, whole: it cannot go on in that of before\n" in stream.getvalue()


# ---- W&B


class WandB(types.ModuleType):
    """The part of W&B that accelerate's class and ours use; a run of ``online`` is known to the server."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.server, self.config = [], {}, types.SimpleNamespace(update=self.configure)

    def configure(self, values, allow_val_change):
        self.runs[-1].config = values

    def init(self, project, dir, id, **options):
        kind = "offline-run" if options["mode"] == "offline" else "run"
        folder = Path(dir, "wandb", f"{kind}-20260101_00000{len(self.runs)}-{id}")
        (folder / "files").mkdir(parents=True)
        rows = self.server.setdefault(id, {}) if options["mode"] == "online" else {}
        run = types.SimpleNamespace(
            id=id, project=project, options=options, rows=rows, dir=str(folder / "files")
        )
        run.step = max(rows) + 1 if rows else 0
        run.log = lambda values, step: rows.setdefault(step, {}).update(values)
        run.finish = lambda: None
        self.runs.append(run)
        return run


wandb = instead_of("wandb", WandB)


def test_wandb_is_offline_and_its_newest_folder_is_whole(tmp_path, wandb):
    telemetry = start(tmp_path / "mine", ["wandb"])
    train(telemetry, 1, 7)
    killed(telemetry)
    stream = io.StringIO()
    with closing(start(tmp_path / "mine", ["wandb"], kept_step=5, stream=stream)) as telemetry:
        train(telemetry, 6, 9, value=3.0)
    first, second = wandb.runs
    assert first.id == second.id
    assert (second.project, second.options["name"]) == ("caco_scale", "mine")
    assert second.options["settings"] == {"console": "off"}
    assert "resume" not in second.options
    assert second.config["bank.size"] == 20
    folder = Path(second.dir).parent
    assert list((tmp_path / "mine" / "wandb").iterdir()) == [folder]
    assert f"tracker wandb: run {second.id}, wandb sync {folder}" in stream.getvalue()
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 18.0, 21.0, 24.0, 27.0]
    assert {step: row["loss"] for step, row in second.rows.items()} == dict(enumerate(losses, 1))
    assert {step: row["knn_top1"] for step, row in second.rows.items() if "knn_top1" in row} == {
        4: 40.0,
        8: 80.0,
    }


def test_wandb_online_goes_on_after_its_last_step(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    telemetry = start(tmp_path, ["wandb"])
    train(telemetry, 1, 7)
    killed(telemetry)
    rows = wandb.server[wandb.runs[0].id]
    for step in (5, 6, 7):  # did not reach the server
        del rows[step]
    with closing(start(tmp_path, ["wandb"], kept_step=6)) as telemetry:
        train(telemetry, 7, 9)
    assert wandb.runs[1].options["resume"] == "allow"
    assert wandb.runs[1].project == "ours"
    assert list(rows) == list(range(1, 10))
    assert len(list((tmp_path / "wandb").iterdir())) == 2


# ---- Trackio: a stand-in, and the package where it is installed


class Trackio(types.ModuleType):
    """The part of Trackio that accelerate's class and ours use: runs of one project, by id."""

    def __init__(self):
        super().__init__("trackio")
        self.runs, self.config = [], types.SimpleNamespace(update=lambda values, **_: None)
        self.Api = lambda: types.SimpleNamespace(runs=lambda project: list(self.runs))

    def init(self, project, name=None):
        run = types.SimpleNamespace(name=name, project=project, rows=[])
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda: None
        run.delete = lambda: self.runs.remove(run)
        self.runs.append(run)
        return run


trackio = instead_of("trackio", Trackio)


def test_trackio_writes_the_run_again_whole(tmp_path, trackio):
    other = trackio.init("caco_scale", "mine-of-another")
    telemetry = start(tmp_path / "mine", ["trackio"])
    train(telemetry, 1, 7)
    killed(telemetry)
    stream = io.StringIO()
    with closing(start(tmp_path / "mine", ["trackio"], kept_step=5, stream=stream)) as telemetry:
        train(telemetry, 6, 9, value=3.0)
    kept, run = trackio.runs
    assert kept is other
    assert run.name.startswith("mine-")
    assert f"tracker trackio: run {run.name}, trackio show --project caco_scale" in stream.getvalue()
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 18.0, 21.0, 24.0, 27.0]
    assert [(step, row["loss"]) for step, row in run.rows if "loss" in row] == list(enumerate(losses, 1))
    assert [(step, row["knn_top1"]) for step, row in run.rows if "knn_top1" in row] == [(4, 40.0), (8, 80.0)]


def test_trackio_elsewhere_has_a_new_run_a_start(tmp_path, trackio, monkeypatch):
    with closing(start(tmp_path, ["trackio"])) as telemetry:
        train(telemetry, 1, 2)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://host")
    with closing(start(tmp_path, ["trackio"], kept_step=2)) as telemetry:
        train(telemetry, 3, 3)
    here, there = trackio.runs
    assert (bool(here.name), there.name) == (True, None)
    assert [step for step, row in there.rows if "loss" in row] == [1, 2, 3]


REAL_TRACKIO = """
import json, os, sys
from caco_scale.run.trackers import PROJECT

if sys.argv[1] == "train":
    import caco_scale
    caco_scale.pretrain("demo", **json.loads(sys.argv[2]))
else:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    found = {run.name: SQLiteStorage.get_logs(PROJECT, run.name) for run in trackio.Api().runs(PROJECT)}
    print(json.dumps(found, default=str))
"""


@pytest.mark.long
def test_a_run_that_was_killed_is_whole_in_the_real_trackio(tmp_path):
    pytest.importorskip("trackio")
    shards, run = make_shard_set(tmp_path / "set", num_images=96, samples_per_shard=20), tmp_path / "run"
    flags = {**SMALL, "data.shards": str(shards), "data.val_shards": str(shards), "run.dir": str(run)}
    flags |= {"run.trackers": ["trackio"], "run.save_every": 4, "eval.knn_every": 2, "optim.epochs": 3}
    flags["run.max_steps"] = 0
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = [sys.executable, "-c", REAL_TRACKIO, "train", json.dumps(flags)]
    process = start_command(words, env=environment)
    kill_when(process, lambda: progress(run)[1] > 9 and any(run.glob("checkpoints/step_*")))
    done = finished(words, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    shown = finished([sys.executable, "-c", REAL_TRACKIO, "show"], env=environment)
    ((name, rows),) = json.loads(shown.stdout.splitlines()[-1]).items()
    assert json.loads((run / "trackers.json").read_text()) == {"trackio": name}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for figure in ("loss", "knn_top1"):
        expected = [(record["step"], record[figure]) for record in records if figure in record]
        assert [(row["step"], row[figure]) for row in rows if row.get(figure) is not None] == expected
        assert expected
