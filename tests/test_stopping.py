"""What stops a run besides a signal: its job's end, the files STOP and SAVE; by files, by clocks, in whole runs."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from launch import SMALL, SWITCH, command, environment, finished, launch, progress, start, start_command
from run_directories import change_values
from shard_sets import make_shard_set

from caco_scale.checkpoint.folder import latest, read_values, steps
from caco_scale.errors import UserError
from caco_scale.run.files import read_json_lines
from caco_scale.run.stopping import ControlFiles, JobEnd, check_job_end, job_end

END = "SLURM_JOB_END_TIME"


def test_a_job_end_is_a_time_to_come():
    assert job_end({}) is None
    assert job_end({END: "1800000000"}) == 1.8e9
    for text in ("soon", "nan", "-5", "inf"):
        with pytest.raises(UserError, match="no time in seconds"):
            job_end({END: text})
    check_job_end({})
    check_job_end({END: f"{time.time() + 1000:.0f}"})
    with pytest.raises(UserError, match=r"seconds ago.*unset it, or give --run.stop_before_end_seconds 0"):
        check_job_end({END: "1600000000"})


def test_what_must_fit_before_the_end():
    now = 1000.0
    end = JobEnd(2000.0, 60, clock=lambda: now)
    end.seconds |= {"save": 20.0, "evaluation": 500.0}  # a resumed run knows
    for seconds in (90.0, *[5.0] * 20):  # the first step compiled
        end.took("step", seconds)
    now = 2000 - 60 - 2 * 20 - 5
    assert end.leaves_time()
    assert not end.leaves_time(for_evaluation=True)
    now += 1
    assert not end.leaves_time()
    end.took("save", 10.0)
    assert end.leaves_time()
    now = 1300.0
    assert end.leaves_time(for_evaluation=True)
    assert JobEnd(None, 60).leaves_time(for_evaluation=True)
    assert JobEnd(1.0, 0).leaves_time()


def test_a_touch_during_the_save_is_another_request(tmp_path):
    now = 0.0
    controls, other = (ControlFiles(tmp_path, is_main, clock=lambda: now) for is_main in (True, False))
    assert controls.look() == (False, False)
    (tmp_path / "SAVE").touch()
    assert controls.look() == (False, False)  # not looked for again so soon
    now = 2.0
    assert controls.look() == (False, True)
    assert other.look() == (False, False)
    controls.save_begins(10)
    now = 4.0
    assert controls.look() == (False, False)  # being answered
    controls.save_is_complete(5)  # an older one
    assert (tmp_path / "SAVE").exists()
    os.utime(tmp_path / "SAVE")
    now = 6.0
    assert controls.look() == (False, True)
    controls.save_is_complete(10)
    assert (tmp_path / "SAVE").exists()
    now = 8.0
    assert controls.look() == (False, True)
    controls.save_begins(20)
    controls.save_is_complete(20)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "STOP").touch()
    now = 10.0
    assert controls.look() == (True, False)
    with pytest.raises(UserError, match="remove it to train on"):
        controls.refuse_stop()
    other.refuse_stop()


# ----------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    shards = make_shard_set(tmp_path_factory.mktemp("data") / "set", num_images=96, samples_per_shard=20)
    return {**SMALL, "data.shards": shards, "run.max_steps": 0, "optim.epochs": 10_000}


def marker(run):
    found = json.loads((run / "INTERRUPTED").read_text())
    assert found["step"] == read_values(latest(run / "checkpoints"))["step"]
    return found["reason"], found["step"]


@contextlib.contextmanager
def running(process):
    """The started run, when it has passed the switch; it does not outlive a test that fails."""
    try:
        run = Path(process.args[process.args.index("--run.dir") + 1])
        wait_for(process, lambda: progress(run) >= (1, SWITCH + 1))
        yield run
    finally:
        if process.poll() is None:
            process.kill()  # its ranks follow
            process.communicate()


def wait_for(process, condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"the run ended by itself:\n{process.stdout.read()}"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.02)


@pytest.mark.long
def test_the_switch_files_of_a_run_on_two_processes(flags, tmp_path):
    flags = {**flags, "run.dir": tmp_path / "run"}
    process = start(flags, num_processes=2)
    with running(process) as run:
        for wanted in (1, 2):
            (run / "SAVE").touch()
            wait_for(process, lambda: not (run / "SAVE").exists())
            assert len(steps(run / "checkpoints")) == wanted
        (run / "STOP").touch()
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    reason, step = marker(run)
    assert reason == "STOP"
    assert f"error: {run / 'STOP'} is there" in launch(flags, code=2)
    (run / "STOP").unlink()
    launch({**flags, "run.max_steps": step + 2})
    assert not (run / "INTERRUPTED").exists()
    assert max(line.get("checkpoint_seconds", 0) for line in read_json_lines(run / "metrics.jsonl")) > 0


@pytest.mark.long
def test_a_signal_to_every_process_of_a_job_step(flags, tmp_path):
    """As SLURM sends it: launcher, ranks and loader workers alike; the batch script has the launcher ignore it."""
    words = command({**flags, "data.workers": 1, "run.dir": tmp_path / "run"}, num_processes=2)
    process = start_command(["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", *words])
    with running(process) as run:
        step = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert (
            len(step) >= 1 + 2 * 3
        )  # the launcher; two ranks, each with its fork server and a loader worker
        for member in step:
            member.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "Traceback" not in output  # of multiprocessing's tracker, which is signalled as well
    assert marker(run)[0] == "SIGUSR1"


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run(flags, tmp_path):
    """In the middle of a save, as likely as not, in whose thread the others must not wait longer either."""
    flags = {**flags, "run.dir": tmp_path / "run", "run.timeout_seconds": 20, "run.save_every": 1}
    process = start(flags, num_processes=2)
    with running(process):
        ranks = [p for p in psutil.Process(process.pid).children() if "caco_scale.pretrain" in p.cmdline()]
        assert len(ranks) == 2
        ranks[1].suspend()
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Timed out waiting 20000ms" in output


def test_storage_that_does_not_answer_ends_the_run(flags, tmp_path):
    """Its loader's worker is stopped, as one is that waits for a disk."""
    flags = {**flags, "run.dir": tmp_path / "run", "data.workers": 1}
    flags |= {"run.timeout_seconds": 8, "run.save_every": 1}
    process = start_command(command(flags))
    with running(process):
        started = psutil.Process(process.pid).children(recursive=True)
        servers = [p.pid for p in started if "multiprocessing.forkserver" in " ".join(p.cmdline())]
        workers = [p for p in started if p.pid in servers and p.ppid() in servers]
        assert len(workers) == 1
        workers[0].suspend()
        output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert output.count("error: no batch came for 8 seconds: the storage of the shards does not answer") == 1
    assert latest(tmp_path / "run/checkpoints") is not None


SILENT_DISK = """
import sys, time
from caco_scale.data.store.local import LocalStore
from caco_scale.errors import run_command
read, reads = LocalStore.read, 0
def silent_after_eight_steps(store, *where):
    global reads
    reads += 1
    while reads > 64:
        time.sleep(1)
    return read(store, *where)
LocalStore.read = silent_after_eight_steps
from caco_scale.pretrain import main
from caco_scale.training.loop import Loop
train = Loop.train
def counted_from_here(loop):  # a start has looked at some images
    global reads
    reads = 0
    return train(loop)
Loop.train = counted_from_here
run_command(lambda: main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_wins_over_a_disk_that_is_silent(flags, tmp_path, number):
    """With no workers, which is to read in this process: what was trained is saved."""
    run = tmp_path / "run"
    flags = {**flags, "run.dir": run, "data.in_memory": False, "run.log_every": 1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = start_command([sys.executable, "-c", SILENT_DISK, "demo", *words])
    try:
        wait_for(process, lambda: progress(run) >= (1, 8))
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert marker(run) == (number.name, 8)
    assert steps(run / "checkpoints") == [8]


def train(flags, variables=None, code=0):
    """One process without a launcher, to its end -> its output."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "caco_scale.pretrain", "demo", *words]
    done = finished(start, env={**environment(), **(variables or {})})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_one_process_that_sees_its_jobs_end_stops_all(flags, tmp_path):
    """Two processes started as two nodes would be: the second alone is told an end, within the time to stop."""
    run = tmp_path / "run"
    flags = {**flags, "run.dir": run, "run.stop_before_end_seconds": 100_000, "run.max_steps": SWITCH + 2}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ends = ({"RANK": "0"}, {"RANK": "1", END: f"{time.time() + 50_000:.0f}"})
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(train, flags, {**group, **end}) for end in ends]
        outputs = [node.result() for node in nodes]
    assert f"stopped by {END} after step 1" in outputs[0]
    assert marker(run) == (END, 1)
    flags["run.stop_before_end_seconds"] = 60
    *said, error = train(flags, {END: "tomorrow"}, code=2).splitlines()
    assert error.startswith(f"error: {END} is 'tomorrow'")
    assert [line.split()[0] for line in said] == ["training", "precision"]  # no step, no traceback
    flags["run.stop_before_end_seconds"] = 0
    train(flags, {END: "1600000000"})
    assert json.loads((run / "DONE").read_text())["step"] == SWITCH + 2


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_left_to_the_next_job(flags, tmp_path):
    run, last = tmp_path / "run", 2
    one_epoch = {
        "data.val_shards": flags["data.shards"],
        "data.window": 16,
        "eval.knn_every": 1,
        "eval.knn_k": 3,
    }
    flags = {**flags, **one_epoch, "data.global_batch_size": 96, "bank.size": 20, "run.dir": run}
    train({**flags, "run.max_steps": 1})
    values = latest(run / "checkpoints") / "values.json"
    text = json.loads(values.read_text())
    assert text["seconds"] == {"save": 0.0, "evaluation": 0.0}  # neither was over when it was written
    change_values(values.parent, seconds={"save": 1.0, "evaluation": 100_000.0})

    ending = {END: f"{time.time() + 50_000:.0f}"}
    flags["run.max_steps"] = last
    output = train(flags, ending)
    assert "step 1: the job is too short for the kNN evaluation: left out" in output
    assert marker(run) == (END, last)
    assert evaluated(run) == [1]
    shutil.copytree(run, tmp_path / "copy")
    assert f"step {last}: the job is too short" in train(
        flags, ending
    )  # nor into the next one: it ends all the same
    assert evaluated(run) == [1]
    train({**flags, "run.dir": tmp_path / "copy"})
    assert evaluated(tmp_path / "copy") == [1, last]
    for folder in (run, tmp_path / "copy"):
        assert json.loads((folder / "DONE").read_text())["step"] == last
        assert not (folder / "INTERRUPTED").exists()


def evaluated(run):
    return [line["step"] for line in read_json_lines(run / "metrics.jsonl") if "knn_top1" in line]
