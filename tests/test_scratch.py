"""What a killed process leaves in the temporary folder and in /dev/shm: the next start clears ours of the dead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment

USES = """
import multiprocessing, os, signal, sys
from caco_scale.errors import at_end, run_command
from caco_scale.run.scratch import use_own_names

def main():
    use_own_names()
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    print(multiprocessing.util.get_temp_dir(), lock._semlock.name, flush=True)
    if sys.argv[1] == "killed":
        os.killpg(0, signal.SIGKILL)
    elif sys.argv[1] == "waits":
        sys.stdin.read()

run_command(main)
"""


def start(folder, how):
    return subprocess.Popen(
        [sys.executable, "-c", USES, how],
        env={**environment(), "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def semaphore(name):
    return Path("/dev/shm", f"sem.{name.strip('/')}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="named semaphores are files on Linux alone")
def test_the_next_start_clears_what_the_killed_left_and_nothing_else(tmp_path):
    living = start(tmp_path, "waits")
    kept, kept_name = living.stdout.readline().split()
    (tmp_path / f"caco-{os.getuid()}-strange").mkdir()  # without a lock: not ours
    (tmp_path / "caco-99999-12345678").mkdir()  # another user's
    dead = start(tmp_path, "killed")
    left, left_name = dead.communicate(timeout=60)[0].split()
    assert dead.returncode == -signal.SIGKILL
    assert Path(left).is_dir()
    assert semaphore(left_name).exists()
    done = start(tmp_path, "ends")
    own, own_name = done.communicate(timeout=60)[0].split()
    assert done.returncode == 0
    assert not any(
        place.exists() for place in (Path(left), semaphore(left_name), Path(own), semaphore(own_name))
    )
    assert Path(kept).is_dir()
    assert semaphore(kept_name).exists()
    _, errors = living.communicate("", timeout=60)
    assert (living.returncode, errors) == (0, "")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([f"caco-{os.getuid()}-strange", "caco-99999-12345678"])
