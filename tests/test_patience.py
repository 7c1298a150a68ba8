"""A disk that hangs: the run ends by words, in bounded time, and a request to stop always wins."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from launch import SMALL, environment
from shard_sets import make_shard_set

from caco_scale.checkpoint.state import State
from caco_scale.checkpoint.write import Checkpointer
from caco_scale.errors import Hung, UserError
from caco_scale.run import patience
from caco_scale.run.audit import AuditLog
from caco_scale.run.directory import RunDirectory
from caco_scale.run.patience import Patience


@pytest.fixture
def stuck():
    """A function that does not return before the test is over."""
    event = threading.Event()
    yield lambda *_: event.wait(60)
    event.set()


def test_answers_and_errors_come_through_in_order():
    disk, seen = Patience("a disk", 30), []
    assert [disk.call(lambda n=n: (seen.append(n), n)[1]) for n in range(100)] == seen == list(range(100))
    assert disk.call(lambda: disk.call(threading.get_ident)) != threading.get_ident()  # a call within a call
    with pytest.raises(OSError, match="no space"):
        disk.call(lambda: (_ for _ in ()).throw(OSError("no space")))
    assert Patience("a disk").call(threading.get_ident) == threading.get_ident()


def test_silence_ends_and_nothing_more_is_asked(stuck):
    disk = Patience("run.dir x", 0.3)
    with pytest.raises(Hung, match=r"run\.dir x does not answer, 0 seconds of silence: the disk hangs"):
        disk.call(stuck)
    assert disk.gone
    with pytest.raises(Hung, match="does not answer"):
        disk.call(lambda: pytest.fail("asked"))
    assert not disk.of("another").gone


def test_a_request_to_stop_shortens_the_wait_and_progress_prolongs_it(stuck, monkeypatch):
    monkeypatch.setattr(patience, "STOPPED_SECONDS", 0.3)
    with pytest.raises(Hung, match="after SIGTERM"):
        Patience("x", 1e6, lambda: "SIGTERM").call(stuck)
    steps = iter([*range(10), *[9] * 1000])
    with pytest.raises(Hung):
        Patience("x", 1e6, lambda: "SIGTERM").until(lambda seconds: time.sleep(0.05), lambda: next(steps))
    assert next(steps) == 9


def test_records_markers_and_checkpoints_have_their_end(stuck, tmp_path, monkeypatch):
    for act in (
        lambda run: (run.append_metrics({"step": 1}), run.flush()),
        lambda run: run.mark_done(3),
        lambda run: run.start_attempt(world_size=1),
        lambda run: run.write_config("x"),
    ):
        run = RunDirectory(tmp_path, True, Patience("run.dir", 0.3))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stuck)
            with pytest.raises(Hung):
                act(run)
        run.close()  # at once
        run._lock.close()
    log = AuditLog(tmp_path / "audit", rank=0, world_size=1, attempt=1, disk=Patience("audit", 0.3))
    checkpointer = Checkpointer(tmp_path / "c", disk=Patience("run.dir", 0.3))
    monkeypatch.setattr(os, "fsync", stuck)
    with pytest.raises(Hung):
        log.flush()
    log.close()
    checkpointer.save(1, State({"query.w": torch.ones(3)}))
    with pytest.raises(Hung):
        checkpointer.wait()


STALL = """
import os, sys, threading
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]
real = {name: getattr(os, name) for name in ("fsync", "rename", "write")}

def blocked(name):
    def call(*arguments, **options):
        if (folder / "stall").exists():
            (folder / "stalled").touch()
            threading.Event().wait()
        return real[name](*arguments, **options)
    return call

setattr(os, what, blocked(what))
from caco_scale.pretrain import main
from caco_scale.errors import run_command
run_command(lambda: main(sys.argv[3:]))
"""


@pytest.mark.parametrize("what", ["fsync", pytest.param("rename", marks=pytest.mark.slow)])
def test_sigterm_ends_a_run_whose_disk_hangs(what, tmp_path):
    make_shard_set(tmp_path / "shards", num_images=24, size=16)
    (tmp_path / "stall.py").write_text(STALL)
    flags = {
        **SMALL,
        "data.shards": tmp_path / "shards",
        "data.audit": tmp_path / "audit.jsonl",
        "data.workers": 0,
        "run.dir": tmp_path / "run",
        "run.max_steps": 0,
        "optim.epochs": 100_000,
        "run.save_every": 2,
        "run.timeout_seconds": 6,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, tmp_path / "stall.py", tmp_path, what, "demo", *words]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(tmp_path / "run/checkpoints/step_00000002", process)
        (tmp_path / "stall").touch()
        wait_for(tmp_path / "stalled", process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, output + errors
    assert re.search(r"error: run\.dir \S+ does not answer, [67] seconds of silence", errors), errors
    assert "Traceback" not in output + errors
    assert not (tmp_path / "run/DONE").exists()


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["metrics.jsonl", "attempts.jsonl", "DONE", ".lock", "corrupt.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_named_and_not_waited_for(name, kind, tmp_path):
    path = tmp_path / name
    path.mkdir() if kind == "folder" else os.mkfifo(path)

    def use():
        with RunDirectory(tmp_path, is_main=True) as run:
            run.done_step()
            run.start_attempt(world_size=1, resumed_step=1)
            run.append("corrupt.jsonl", {"step": 2})
            run.append_metrics({"step": 2})

    with pytest.raises(UserError, match=f"{name} is a {kind}.*move it away"):
        use()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_an_audit_file_that_is_none(kind, tmp_path):
    path = tmp_path / "audit"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match=f"audit is a {kind}"):
        AuditLog(path, rank=0, world_size=1, attempt=1)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "DONE", "INTERRUPTED"])
def test_a_folder_where_a_file_is_replaced(name, tmp_path):
    (tmp_path / name).mkdir()
    with RunDirectory(tmp_path, is_main=True) as run, pytest.raises(UserError, match=f"{name} is a folder"):
        write_all(run)


def write_all(run):
    run.write_config("x")
    run.write_environment({})
    run.mark_interrupted(1, "SIGTERM")
    run.mark_done(1)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"step": null}', '{"step": "x"}', "[" * 5000, '{"step": 1e999}']
)
def test_a_marker_without_a_step(text, tmp_path):
    (tmp_path / "DONE").write_text(text)
    with (
        RunDirectory(tmp_path, is_main=True) as run,
        pytest.raises(UserError, match="does not record a step"),
    ):
        run.done_step()


def test_leftovers_of_killed_processes_go_with_the_next_start(tmp_path):
    for name in ("environment.json.123.tmp", "config.yaml.9.tmp", "metrics.jsonl.1.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").write_text("a user's")
    with RunDirectory(tmp_path, is_main=True):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints", "mine.tmp"]


def test_all_records_are_cut_back_to_the_checkpoint(tmp_path):
    def steps(name):
        return [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]

    with RunDirectory(tmp_path, is_main=True) as run:
        for step in (1, 2, 3, 4):
            run.append_metrics({"step": step})
            run.append("corrupt.jsonl", {"step": step, "key": f"a/{step}"})
        run.start_attempt(world_size=1, resumed_step=2)
        for name in ("metrics.jsonl", "corrupt.jsonl"):
            assert steps(name) == [1, 2]
        run.start_attempt(world_size=1, resumed_step=2, of_another=True)  # of which no step was here
        assert steps("metrics.jsonl") == steps("corrupt.jsonl") == []
