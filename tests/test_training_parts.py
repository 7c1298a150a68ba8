"""The parts of the loop: each one's concern, and what a checkpoint keeps of it; a whole run called from Python."""

import contextlib
import io
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from gloo import run_ranks
from launch import SMALL, SWITCH
from run_directories import change_values
from shard_sets import make_shard_set

from caco_scale import config as configuration
from caco_scale.benchmark.counts import Counts
from caco_scale.checkpoint.folder import latest, read_values
from caco_scale.checkpoint.read import load_tensors
from caco_scale.errors import UserError
from caco_scale.run.directory import RunDirectory
from caco_scale.run.files import read_json_lines
from caco_scale.run.stopping import Requests
from caco_scale.run.telemetry import Telemetry
from caco_scale.training.corrupt import CorruptImages
from caco_scale.training.evaluations import worse_than_before
from caco_scale.training.health import Health
from caco_scale.training.loop import Loop
from caco_scale.training.skipped import SkippedSteps
from caco_scale.training.trainer import Outcome, run

# As 4b5f358 wrote them, tensors' facts aside: what readers of checkpoints and older programs rely on.
VALUES = (
    *("step", "end", "branched_from", "epoch", "config", "fingerprint", "num_samples", "skipped"),
    *("skipped_in_a_row", "corrupt", "last_epoch_bank", "knn", "seconds", "bank_pointer"),
)


@pytest.fixture
def directory(tmp_path):
    with RunDirectory(tmp_path / "run", is_main=True) as directory:
        yield directory


@pytest.fixture
def telemetry(directory):
    telemetry = Telemetry(
        directory, total_steps=9, steps_per_epoch=3, images_per_step=8, stream=io.StringIO()
    )
    yield telemetry
    telemetry.close()


def test_skipped_steps_in_a_row_end_the_run_also_across_a_resume(directory, telemetry):
    skipped = SkippedSteps(3, telemetry)
    for step, moved in enumerate((False, False, True, False, False), start=1):
        skipped.count(step, moved)
    assert skipped.total == 4
    resumed = SkippedSteps(3, telemetry)
    resumed.load_state_dict(json.loads(json.dumps(skipped.state_dict())))
    with pytest.raises(UserError, match=r"step 6: 3 steps in a row were not finite \(run.max_skipped 3\)"):
        resumed.count(6, False)
    assert [line["skipped"] for line in read_json_lines(directory.metrics)] == [1, 2, 3, 4, 5]


def test_corrupt_images_count_once_and_too_many_end_the_run(directory, telemetry):
    config = configuration.replace(
        configuration.load_recipe("demo"), data__max_corrupt=0.02, data__shards="/data/train"
    )
    corrupt = CorruptImages(config, 100, "repair them", directory, telemetry)

    def entries(*names):
        return [{"key": name, "error": "cut", "substitute": "x"} for name in names]

    corrupt.record(1, entries("a", "b"))
    corrupt.record(2, entries("a"))
    resumed = CorruptImages(config, 100, "repair them", directory, telemetry)
    resumed.load_state_dict(json.loads(json.dumps(corrupt.state_dict())))
    resumed.record(3, entries("b"))
    assert len(resumed) == 2
    with pytest.raises(
        UserError, match=r"3 of 100 images do not decode, more than data.max_corrupt 0.02: a, b, c"
    ):
        resumed.record(4, entries("c"))
    lines = list(read_json_lines(directory.path / "corrupt.jsonl"))
    assert [(line["step"], line["key"]) for line in lines] == [(1, "a"), (1, "b"), (4, "c")]


class Bank:
    """As much of a bank as Health asks: rows used are counted by the steps since the last reset."""

    dim, steps = 4, 0

    def reset_assignments(self):
        self.steps = 0

    def diagnostics(self):
        return {"rows_used": self.steps / 10, "assignment_entropy": 0.5, "row_norm": 1.0}


def bank_figures(telemetry, warmup, steps=12, counts=1, resumed=None):
    """step -> the bank's figures in the metrics, of epochs of three steps."""
    bank, backbone, found = Bank(), torch.nn.Identity(), {}
    health = Health(
        backbone, bank, world_size=1, steps_per_epoch=3, bank_warmup_steps=warmup, telemetry=telemetry
    )
    if resumed:
        health.load_state_dict(resumed)
    for step in range(steps):
        health.before_step(step)
        backbone(torch.randn(8, 4))
        bank.steps += counts * (step >= warmup)
        health.after_step(step + 1)
        queries = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
        figures = health.figures(SimpleNamespace(queries=queries))
        found[step + 1] = {n: v for n, v in figures.items() if n.startswith("bank")}
    return found


def test_figures_of_the_bank_are_absent_until_an_epoch_has_measured_them(telemetry):
    found = bank_figures(telemetry, warmup=4)
    assert [step for step, figures in found.items() if not figures] == [1, 2, 3, 4, 5]
    assert found[6] == {"bank_rows_used": 0.2, "bank_assignment_entropy": 0.5, "bank_row_norm": 1.0}
    assert found[9]["bank_rows_used"] == found[12]["bank_rows_used"] == 0.3
    found = bank_figures(telemetry, warmup=5)  # one step of three is no measure of an epoch
    assert [step for step, figures in found.items() if not figures] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert bank_figures(telemetry, warmup=0, counts=0)[12] == {
        "bank_row_norm": 1.0
    }  # a rule without positives
    of_warmup = {"step": 4, "last_epoch_bank": {"rows_used": 0.0, "assignment_entropy": 0.0, "row_norm": 1.0}}
    assert bank_figures(telemetry, warmup=7, steps=2, resumed=of_warmup) == {1: {}, 2: {}}


def test_a_score_below_that_before_training_is_a_warning_that_says_what_to_try():
    knn = {"pixels": 40.0, 0: 30.0, 100: 25.0, 200: 35.0, 300: 45.0}
    line = worse_than_before(knn, 100)
    assert line.startswith(
        "step 100: kNN top-1 25.00% is below the untrained encoder's 30.00% and raw pixels' 40.00%"
    )
    assert "bank.warmup_epochs" in line
    assert "raw pixels' 40.00%" in worse_than_before(knn, 200)
    assert worse_than_before(knn, 200, late=False) is worse_than_before(knn, 300) is None
    assert "the starting encoder's" in worse_than_before(knn, 100, "starting")
    assert worse_than_before({100: 1.0}, 100) is None


def test_a_stop_is_answered_with_what_will_happen_and_what_is_lost(capfd):
    said = []
    loop = SimpleNamespace(
        step=130,
        _complete=100,
        strategy=SimpleNamespace(rank=0),
        evaluations=SimpleNamespace(running=False),
        records=SimpleNamespace(telemetry=SimpleNamespace(note=said.append)),
    )
    Loop._answer(loop, "SIGTERM", False)
    Loop._answer(loop, "SIGINT", False)
    loop.evaluations.running = True
    Loop._answer(loop, "SIGUSR1", False)
    loses = "; a second Ctrl-C stops at once and loses 30 steps since the checkpoint of step 100"
    assert said == [
        "SIGTERM: stopping after this step, then saving",
        f"SIGINT: stopping after this step, then saving{loses}",
        "SIGUSR1: stopping after this kNN evaluation and a step, then saving",
    ]
    Loop._answer(loop, "SIGINT", True)
    loop._complete = 0
    Loop._answer(loop, "SIGINT", True)
    assert [line for line in capfd.readouterr().err.splitlines() if line] == [
        "stopped at once by a second Ctrl-C: 30 steps since the checkpoint of step 100 are lost, the same command "
        "goes on from there",
        "stopped at once by a second Ctrl-C: all 130 steps are lost, for there is no checkpoint yet",
    ]


def test_requests_name_the_first_reason_and_remember_what_a_save_takes(directory, monkeypatch):
    class Requested:
        requested = None
        ending_at_once = telling = contextlib.nullcontext

    requests = Requests(Requested, directory, 0)
    assert requests.look(evaluation_is_due=True) == (None, False)
    Requested.requested = "SIGTERM"
    assert requests.look(evaluation_is_due=False) == ("SIGTERM", False)
    (directory.path / "SAVE").touch()
    (directory.path / "STOP").touch()
    assert Requests(None, directory, 0).look(evaluation_is_due=False) == ("STOP", True)
    requests.save_is_complete(3, 2.5)
    resumed = Requests(None, directory, 0)
    resumed.load_state_dict(json.loads(json.dumps(requests.state_dict())))
    assert resumed.job_end.seconds == {"save": 2.5, "evaluation": 0.0}
    resumed.load_state_dict({})  # of a checkpoint before there was such a thing


class Told:
    """A loop's parts, of which this rank is told something."""

    def __init__(self, stop=None, save=False, counts=None, logs=False):
        self.requests = SimpleNamespace(look=lambda due: (stop, save))
        self.evaluations = SimpleNamespace(due=lambda step: False)
        self.checkpointer = SimpleNamespace(failed=False)
        self.data = SimpleNamespace(counters=SimpleNamespace(take=lambda: counts or {}))
        self.corrupt = SimpleNamespace(record=lambda step, entries: self.seen.extend(entries))
        self.read, self.step, self.seen, self._logs = Counter(), 4, [], lambda step: logs and step == 5

    def _note_complete_save(self):
        pass


def agree(rank, world_size):
    found = []
    for told, corrupt in (
        (Told(), []),
        (Told(counts={"reads": 2}), []),  # kept for the step before the next line
        (Told(counts={"reads": 2 + rank}, logs=True), []),
        (Told(), [{"key": f"{rank}"}]),
        (Told("SIGTERM" if rank else None), []),
        (Told(save=rank == 0), []),
    ):
        with Counts() as counts:
            answer = Loop._agree(told, SimpleNamespace(corrupt=corrupt))
        found.append((answer, dict(told.read), [entry["key"] for entry in told.seen], counts.exchanges))
    return found


def test_after_a_step_ranks_exchange_a_byte_and_what_any_of_them_was_told():
    nothing = (None, False)
    assert (
        run_ranks(agree, 2)
        == [
            [
                (nothing, {}, [], 1),
                (nothing, {}, [], 1),
                (nothing, {"reads": 5}, [], 3),
                (nothing, {}, ["0", "1"], 3),
                (("SIGTERM", False), {}, [], 3),
                ((None, True), {}, [], 3),
            ]
        ]
        * 2
    )


def start_with_another_setting(rank, world_size):
    complaints = []
    for change in ({"bank__size": 7 + rank}, {"run__log_every": 2 + rank}):
        with pytest.raises(UserError) as error:
            run(configuration.replace(configuration.load_recipe("demo"), **change))
        complaints.append(str(error.value))
    return complaints


def test_processes_that_were_started_with_different_settings_end_with_the_field_and_its_values():
    for complaints in run_ranks(start_with_another_setting, 2):
        assert complaints == [
            "start: the bank.size must be the same on every rank, but is 7 on rank 0, 8 on rank 1",
            "start: the run.log_every must be the same on every rank, but is 2 on rank 0, 3 on rank 1",
        ]


# ----------------------------------------------------------------------------------------------------------
# A run, called


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    shards = make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)
    flags = {name.replace(".", "__"): value for name, value in SMALL.items()}
    return configuration.replace(configuration.load_recipe("demo"), **flags, data__shards=str(shards))


def called(config, folder, **changes):
    """The run and the records it handed on."""
    seen = []
    outcome = run(configuration.replace(config, run__dir=str(folder), **changes), on_metrics=seen.append)
    return outcome, seen


def tensors(folder):
    return load_tensors(latest(folder / "checkpoints"))


def test_runs_follow_each_other_in_one_process_also_in_a_thread(config, tmp_path):
    outcome, seen = called(config, tmp_path / "one")
    assert outcome == Outcome(15, None, tmp_path / "one")
    assert seen == list(read_json_lines(tmp_path / "one/metrics.jsonl"))
    assert [record["step"] for record in seen] == list(range(1, 16))

    assert called(config, tmp_path / "two", run__max_steps=SWITCH + 4)[0].step == SWITCH + 4
    with ThreadPoolExecutor(1) as thread:  # a notebook's, say: no signal can be taken over there
        outcome, seen = thread.submit(called, config, tmp_path / "two").result()
    assert [record["step"] for record in seen] == list(range(SWITCH + 5, 16))
    expected = tensors(tmp_path / "one")
    assert all(torch.equal(found, expected[name]) for name, found in tensors(tmp_path / "two").items())

    again, seen = called(config, tmp_path / "two")  # nothing is left to do, and nothing is held
    assert (again, seen) == (outcome, [])
    values = read_values(latest(tmp_path / "two/checkpoints"))
    assert [name for name in values if name in VALUES] == list(VALUES)


def test_a_run_that_fails_leaves_its_directory_to_the_next_start(config, tmp_path):
    def fail(record):
        if record["step"] == 5:
            raise RuntimeError("the caller's own")

    changed = configuration.replace(config, run__dir=str(tmp_path), run__save_every=2)
    with pytest.raises(RuntimeError, match="the caller's own"):
        run(changed, on_metrics=fail)
    assert run(changed).step == 15
    attempts = list(read_json_lines(tmp_path / "attempts.jsonl"))
    assert [attempt["resumed_step"] for attempt in attempts] == [None, 4]


def test_a_signal_of_the_caller_stops_a_run(config, tmp_path):
    class Requested:
        requested = None
        ending_at_once = telling = contextlib.nullcontext

    def ask(record):
        if record["step"] == SWITCH + 2:
            Requested.requested = "SIGINT"

    changed = configuration.replace(config, run__dir=str(tmp_path))
    assert run(changed, Requested, ask) == Outcome(SWITCH + 2, "SIGINT", tmp_path)
    assert json.loads((tmp_path / "INTERRUPTED").read_text())["reason"] == "SIGINT"


class Killed(Exception):
    pass


def killed_at(step, key):
    """A caller's function that ends the run where ``key`` of ``step`` has just been logged."""

    def on_metrics(record):
        if record["step"] == step and key in record:
            raise Killed

    return on_metrics


def test_what_follows_a_save_is_run_and_logged_once(config, tmp_path):
    """An evaluation is no part of its step's checkpoint: whether it was done is what the metrics say."""
    config = configuration.replace(
        config,
        run__dir=str(tmp_path / "run"),
        run__save_every=12,
        run__max_steps=13,
        run__keep_checkpoints=1,
        data__val_shards=config.data.shards,
        data__workers=0,
        eval__knn_every=1,
        eval__knn_k=3,
    )

    def evaluated():
        return [
            line["step"] for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "knn_top1" in line
        ]

    for step in (12, 13):
        with pytest.raises(Killed):
            run(config, on_metrics=killed_at(step, "knn_top1"))
        assert evaluated()[-1] == step
        assert latest(tmp_path / "run/checkpoints").name == f"step_{step:08d}"
        assert [step] not in [known[:1] for known in read_values(latest(tmp_path / "run/checkpoints"))["knn"]]
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_text(
        "".join(line for line in metrics.open() if '"step": 13, "epoch"' not in line or "loss" in line)
    )
    shutil.copytree(tmp_path / "run/checkpoints/step_00000013", tmp_path / "run/checkpoints/step_00000012")
    change_values(tmp_path / "run/checkpoints/step_00000012", step=12)
    assert evaluated() == [
        12
    ]  # killed in the middle of the last one, and before the older checkpoint was removed
    assert run(config) == Outcome(13, None, tmp_path / "run")
    assert evaluated() == [12, 13]
    assert (tmp_path / "run/DONE").exists()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000013"]
    (tmp_path / "run/DONE").unlink()  # killed between the evaluation and the marker
    assert run(config) == Outcome(13, None, tmp_path / "run")
    assert evaluated() == [12, 13]
    assert (tmp_path / "run/DONE").exists()


def test_a_run_named_by_its_directory_gives_its_newest_checkpoint(config, tmp_path):
    config = configuration.replace(config, data__workers=0)
    called(config, tmp_path / "one", run__max_steps=4, run__save_every=2)
    branch = {"run__resume": str(tmp_path / "one")}
    called(config, tmp_path / "two", run__max_steps=5, **branch)
    assert read_values(latest(tmp_path / "two/checkpoints"))["branched_from"].endswith("step_00000004")
    called(
        config, tmp_path / "one", run__max_steps=6
    )  # the same command goes on with the branch all the same
    outcome, _ = called(config, tmp_path / "two", run__max_steps=7, **branch)
    assert outcome.step == 7
    resumed = [line["resumed_step"] for line in read_json_lines(tmp_path / "two/attempts.jsonl")]
    assert resumed == [4, 5]
    with pytest.raises(UserError, match="no complete checkpoint in"):
        called(config, tmp_path / "three", run__resume=str(tmp_path))
