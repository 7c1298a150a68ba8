"""The run directory: markers, attempts, metrics that are cut back, lines that a kill has cut."""

import errno
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import caco_scale
from caco_scale.errors import UserError
from caco_scale.run import lock
from caco_scale.run.directory import RunDirectory
from caco_scale.run.environment import describe_environment, git_commit
from caco_scale.run.files import JsonLines, check_target, last_json_line, read_json_lines, to_plain


def metrics(run):
    return list(read_json_lines(run.metrics))


def test_numbers_become_valid_json(tmp_path):
    record = {
        "nan": math.nan,
        "infinite": -math.inf,
        "tensor": torch.tensor(1.5),
        "nan_tensor": torch.tensor(math.nan),
        "numpy": np.float32(0.25),
        "array": np.array([1, 2]),
        "nested": {"list": [math.inf, 1, True, None, "text"]},
    }
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append(record)
    lines.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "lines.jsonl").read_text(), parse_constant=refuse)
    assert written == {
        "nan": None,
        "infinite": None,
        "tensor": 1.5,
        "nan_tensor": None,
        "numpy": 0.25,
        "array": [1, 2],
        "nested": {"list": [None, 1, True, None, "text"]},
    }
    assert to_plain(torch.tensor(3)) == 3
    assert isinstance(to_plain(torch.tensor(3)), int)


@pytest.mark.parametrize("cut_at", [1, 9, -2])
def test_a_cut_line_is_skipped_and_never_glued(tmp_path, cut_at):
    path = tmp_path / "lines.jsonl"
    second = json.dumps({"step": 2, "keys": ["a/é", "b"]}).encode()
    path.write_bytes(b'{"step": 1}\n' + second[:cut_at])
    lines = JsonLines(path)
    lines.append({"step": 3})
    lines.close()
    assert [record["step"] for record in read_json_lines(path)] == [1, 3]
    assert last_json_line(path) == {"step": 3}


def test_a_whole_line_without_its_newline_counts(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    lines = JsonLines(path)
    lines.append({"step": 3})
    lines.close()
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3]


def test_last_line_of_long_lines_and_of_rubbish(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert last_json_line(path) is None
    path.write_bytes(b"\xff\x00 rubbish\n[1, 2]\n")
    assert last_json_line(path) is None
    path.write_bytes(
        b'{"step": 1}\n' + json.dumps({"step": 2, "keys": ["k" * 200_000]}).encode() + b"\n{" + b"x" * 100_000
    )
    assert last_json_line(path)["step"] == 2
    path.write_bytes(b'{"step": 1}\n{' + b"x" * 2_000_000)
    assert last_json_line(path) == {"step": 1}


def test_attempts_grow_and_survive_a_cut_line(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a", is_main=True)
    assert run.start_attempt(world_size=2) == 1
    assert run.start_attempt(world_size=3, resumed_step=40, command=["train"]) == 2
    with open(run.path / "attempts.jsonl", "ab") as file:
        file.write(b'{"attempt": 3, "ti')
    run.close()
    assert RunDirectory(run.path, is_main=True).start_attempt(world_size=1, resumed_step=60) == 3
    attempts = list(read_json_lines(run.path / "attempts.jsonl"))
    assert [(line["attempt"], line["world_size"], line["resumed_step"]) for line in attempts] == [
        (1, 2, None),
        (2, 3, 40),
        (3, 1, 60),
    ]
    assert attempts[1]["command"] == ["train"]
    assert all(line["time"] for line in attempts)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path, is_main=True)
    for step in (10, 20, 30, 40):
        run.append_metrics({"step": step, "loss": 1 / step})
    run.append_metrics({"step": 30, "knn_top1": 50.0})
    run.flush()
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 25, "lo')
    run.truncate(30)
    run.append_metrics({"step": 31, "loss": math.nan})
    assert [line["step"] for line in metrics(run)] == [10, 20, 30, 30, 31]
    assert len(run.metrics.read_bytes().splitlines()) == 5
    assert metrics(run)[-1]["loss"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "metrics.jsonl"]


def test_an_attempt_cuts_metrics_and_removes_markers(tmp_path):
    run = RunDirectory(tmp_path, is_main=True)
    assert run.done_step() is None
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    run.mark_interrupted(3, "SIGUSR1")
    assert (
        json.loads((tmp_path / "INTERRUPTED").read_text()).items() >= {"step": 3, "reason": "SIGUSR1"}.items()
    )
    run.start_attempt(world_size=1, resumed_step=2)
    assert not (tmp_path / "INTERRUPTED").exists()
    assert [line["step"] for line in metrics(run)] == [1, 2]

    run.mark_done(8)
    assert RunDirectory(tmp_path, is_main=False).done_step() == 8
    run.start_attempt(world_size=1)
    assert run.done_step() is None
    assert metrics(run) == []


def test_done_that_records_no_step_is_one_line(tmp_path):
    (tmp_path / "DONE").write_text("")
    with pytest.raises(UserError, match="DONE does not record a step; delete it"):
        RunDirectory(tmp_path, is_main=True).done_step()


@pytest.mark.parametrize("name", ["INTERRUPTED", "environment.json.123.tmp"])
def test_a_file_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch, name):
    def refused(self, missing_ok=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path / name}: Permission denied; free or fix"):
        RunDirectory(tmp_path, is_main=True).mark_done(3)
    assert not (tmp_path / "DONE").exists()


def test_only_the_main_rank_writes(tmp_path):
    run = RunDirectory(tmp_path / "run", is_main=False)
    run.write_config("a: 1")
    run.write_environment({})
    run.append_metrics({"step": 1})
    run.mark_done(1)
    run.flush()
    assert run.start_attempt(world_size=2) is None
    assert not (tmp_path / "run").exists()


def test_config_and_environment_are_whole_files(tmp_path):
    run = RunDirectory(tmp_path, is_main=True)
    run.write_config("bank:\n  size: 5\n")
    run.write_config("bank:\n  size: 6\n")
    assert (tmp_path / "config.yaml").read_text() == "bank:\n  size: 6\n"
    run.write_environment(
        describe_environment(world_size=2, devices=["cpu", "cpu"], hosts=["n1", "n2"], backend="gloo")
    )
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"]
    )
    assert environment["hosts"] == ["n1", "n2"]
    assert environment["world_size"] == 2
    assert environment["backend"] == "gloo"
    assert "git_commit" in environment
    assert environment["command"]


def test_commit_is_of_a_checkout_that_tracks_the_package(tmp_path):
    import subprocess

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )

    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert git_commit(package) == commit
    assert git_commit(installed) is None  # lies in the checkout, but is no part of it
    (package / "__init__.py").write_text("changed = True")
    assert git_commit(package) == commit + "+changes"
    assert caco_scale.__file__


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(
        UserError, match=r"cannot create the run directory .*; name another place with run.dir"
    ):
        RunDirectory(tmp_path / "run", is_main=True)


def test_two_runs_in_one_directory_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.1)
    first = RunDirectory(tmp_path, is_main=True)
    with pytest.raises(UserError, match="in use by another running process"):
        RunDirectory(tmp_path, is_main=True)
    first.close()
    RunDirectory(tmp_path, is_main=True).close()


def test_a_fork_of_a_run_does_not_hold_its_directory(tmp_path, monkeypatch):
    """As one that a tracker makes, and that outlives the run for a while."""
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.1)
    run = RunDirectory(tmp_path, is_main=True)
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        with pytest.raises(UserError, match="in use by another running process"):  # by the run itself
            RunDirectory(tmp_path, is_main=True)
        run.close()
        deadline = time.monotonic() + 60
        while lock.is_held(tmp_path / ".lock"):  # until the child has come so far
            assert time.monotonic() < deadline
            time.sleep(0.01)
        RunDirectory(tmp_path, is_main=True).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_place_for_a_file_is_judged_before_work(tmp_path):
    (tmp_path / "a file").touch()
    check_target(tmp_path / "new.npz")
    check_target(tmp_path / "a file")
    check_target(f"{tmp_path}/folder/", is_folder=True)
    for place, message in (
        (tmp_path, "is a directory: give the name of a file in it"),
        ("/dev/null", "is no ordinary file"),
        ("s3://bucket/f.npz", "is an address"),
        (tmp_path / "no such/f.npz", f"mkdir -p '{tmp_path}/no such'"),
        (tmp_path / "a file/f.npz", f"{tmp_path}/a file is a file, give another name"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--to {place} ") + ".*" + re.escape(message)):
            check_target(place)
