"""The audit log across kills, resumes and other world sizes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from caco_scale.errors import UserError
from caco_scale.run.audit import AuditLog, incomplete_steps, read_audit


def write(path, *, attempt, world_size, steps, ranks=None):
    for rank in range(world_size) if ranks is None else ranks:
        log = AuditLog(path, rank=rank, world_size=world_size, attempt=attempt)
        for step in steps:
            log.append(step, step // 10, batch(step, world_size)[rank])
        log.flush()
        log.close()


def batch(step, world_size):
    """The ranks' keys of a step: 12 images, the same ones at any world size."""
    keys = [f"{step:06d}.tar/{image:04d}" for image in range(12)]
    return [keys[rank * 12 // world_size : (rank + 1) * 12 // world_size] for rank in range(world_size)]


def whole(step):
    return batch(step, 1)[0]


def test_a_line_holds_what_readers_are_promised(tmp_path):
    write(tmp_path / "audit", attempt=4, world_size=2, steps=[11])
    line = json.loads((tmp_path / "audit.rank1").read_text())
    assert line == {"step": 11, "epoch": 1, "rank": 1, "world_size": 2, "attempt": 4, "keys": batch(11, 2)[1]}


def test_ranks_are_joined_in_rank_order_beyond_nine(tmp_path):
    write(tmp_path / "audit", attempt=1, world_size=12, steps=[1, 2])
    assert read_audit(tmp_path / "audit") == {1: whole(1), 2: whole(2)}


def test_only_the_latest_attempt_of_a_step_counts_at_its_own_world_size(tmp_path):
    path = tmp_path / "logs" / "audit.jsonl"
    write(path, attempt=1, world_size=3, steps=range(1, 9))
    write(path, attempt=2, world_size=2, steps=range(5, 12))
    write(path, attempt=3, world_size=4, steps=range(10, 14))
    assert read_audit(path) == {step: whole(step) for step in range(1, 14)}
    assert list(read_audit(path)) == list(range(1, 14))
    assert incomplete_steps(path) == {}


def test_a_step_that_lacks_a_rank_in_its_latest_attempt_is_left_out(tmp_path):
    path = tmp_path / "audit"
    write(path, attempt=1, world_size=2, steps=[1, 2, 3])
    write(path, attempt=2, world_size=3, steps=[3], ranks=[0, 2])
    assert read_audit(path) == {1: whole(1), 2: whole(2)}
    assert incomplete_steps(path) == {3: [1]}
    write(path, attempt=3, world_size=1, steps=[3, 4])
    assert read_audit(path) == {step: whole(step) for step in (1, 2, 3, 4)}


def test_a_cut_line_leaves_its_step_incomplete_until_it_is_done_again(tmp_path):
    path = tmp_path / "audit"
    write(path, attempt=1, world_size=2, steps=[1, 2])
    cut = (tmp_path / "audit.rank1").read_bytes()[:-7]
    (tmp_path / "audit.rank1").write_bytes(cut)
    assert read_audit(path) == {1: whole(1)}
    assert incomplete_steps(path) == {2: [1]}
    write(path, attempt=2, world_size=2, steps=[2, 3])
    assert read_audit(path) == {step: whole(step) for step in (1, 2, 3)}
    assert (tmp_path / "audit.rank1").read_bytes().startswith(cut + b"\n")


def test_other_files_beside_the_log_are_no_ranks(tmp_path):
    write(tmp_path / "audit", attempt=1, world_size=1, steps=[1])
    write(tmp_path / "audit[1]", attempt=1, world_size=2, steps=[1, 2])
    write(tmp_path / "other.audit", attempt=1, world_size=2, steps=[7])
    assert list(read_audit(tmp_path / "audit")) == [1]
    assert list(read_audit(tmp_path / "audit[1]")) == [1, 2]


def test_a_log_of_another_run_is_refused(tmp_path):
    write(tmp_path / "audit", attempt=3, world_size=1, steps=[1])
    with pytest.raises(
        UserError, match="holds attempt 3 of another run and this is attempt 1; name another file"
    ):
        AuditLog(tmp_path / "audit", rank=0, world_size=1, attempt=1)
    with pytest.raises(UserError, match="no audit log at"):
        read_audit(tmp_path / "nothing")


WRITER = """
import sys
from caco_scale.run.audit import AuditLog
log = AuditLog(sys.argv[1], rank=0, world_size=1, attempt=int(sys.argv[2]))
step = int(sys.argv[3])
while True:
    log.append(step, 0, [f"{step:06d}.tar/{image:08d}" for image in range(2000)])
    step += 1
"""


def holds_step(path, step):
    return path.exists() and b'\n{"step": %d,' % step in path.read_bytes()


def test_kill_9_while_appending_then_append_again(tmp_path):
    path = tmp_path / "audit"
    start = 0
    for attempt in range(1, 4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(attempt), str(start)])
        while not holds_step(path, start + 20):
            assert writer.poll() is None
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        os.truncate(path, path.stat().st_size - 11)  # in the last line, as where a disk filled up
        start += 15
    log = AuditLog(path, rank=0, world_size=1, attempt=4)
    log.append(start, 0, ["last"])
    log.close()

    steps = read_audit(path)
    last_whole = max(steps)
    assert list(steps) == list(range(last_whole + 1))
    assert last_whole >= start
    assert steps.pop(start) == ["last"]
    assert all(
        keys == [f"{step:06d}.tar/{image:08d}" for image in range(2000)] for step, keys in steps.items()
    )
