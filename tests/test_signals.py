"""Signals: a flag; loader processes that survive them; a trainer that follows its launcher."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch import start_command

from caco_scale.run.signals import LAUNCHER, STOP_SIGNALS, Interrupted, Signals, interrupting

ROOT = Path(__file__).parent.parent


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as the tests' own process may have it, under nohup
    yield Signals().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_only_sets_a_flag(signals, name):
    assert signals.requested is None
    signal.raise_signal(getattr(signal, name))
    assert signals.requested == name


def test_a_first_signal_is_answered_while_the_program_computes():
    said = []
    with Signals() as signals, signals.telling(lambda *words: said.append(words)):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # one call, within which Python runs no handler
        said.append("computed")
    assert said == [("SIGTERM", False), "computed"]
    assert signals.requested == "SIGTERM"


def test_a_second_ctrl_c_says_what_it_costs():
    said = []

    def interrupted_twice():
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)  # one that comes before it is answered, too
            with signals.telling(lambda *words: said.append(words)):
                assert said == [("SIGINT", False)]
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert said == [("SIGINT", False), ("SIGINT", True)]
    assert signal.set_wakeup_fd(-1) == -1


def test_under_nohup_a_run_goes_on_but_not_under_torchrun_which_ends_there(monkeypatch):
    """In a session of torchrun's own, SIGHUP comes from it alone, on its way out."""
    found = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.requested is None
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.requested == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with interrupting():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_not_a_run_is_interrupted(number):
    found = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as stop, interrupting():
            signal.raise_signal(number)
        assert stop.value.code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, found)


ENDING = """
import ctypes, os
from caco_scale.run.signals import Signals
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.pause, None, None)  # after the interpreter, whose end drops its handlers, as torch's threads do
signals = Signals().install()
print("pids", os.getpid(), flush=True)
"""


def catches(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1


@pytest.mark.parametrize("retired", [True, False])
def test_a_late_signal_does_not_kill_a_trainer_that_has_retired(tmp_path, retired):
    script = tmp_path / "ending.py"
    script.write_text(ENDING + "signals.retire()\n" * retired)
    process, (pid,) = start(script)
    deadline = time.time() + 60
    while catches(pid, signal.SIGTERM):
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == (-signal.SIGTERM if retired else -signal.SIGUSR1)
    process.communicate()


def start(script, *args, **kwargs):
    """A python process that prints its pids on its first line; in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*args, str(script)] if args else [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **kwargs,
    )
    return process, pids_of(process)


def pids_of(process):
    line = process.stdout.readline()
    assert line.startswith("pids "), line + process.communicate()[1]
    return [int(word) for word in line.split()[1:]]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=60):
    deadline = time.time() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.time() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.05)


def test_as_a_context_the_handlers_that_it_found_come_back():
    # set here: a shell starts background jobs with SIGINT ignored, and the handlers of the tests' own process with it
    found = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert signals.requested == "SIGTERM"
            with pytest.raises(KeyboardInterrupt):  # the second one is the outer program's
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def test_outside_the_main_thread_no_signal_is_taken_over():
    def use():
        with Signals() as signals:
            signals.retire()
        return signals.requested, signal.getsignal(signal.SIGUSR1)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(use).result() == (None, signal.getsignal(signal.SIGUSR1))


WAITING = """
import os, sys, time
from caco_scale.run.signals import Signals
assert "torch" not in sys.modules
signals = Signals().install()
print("pids", os.getpid(), flush=True)
while signals.requested is None:
    time.sleep(0.01)
print(signals.requested, flush=True)
while "hang" in __file__:
    time.sleep(0.01)
print("checkpoint written", flush=True)
"""


def test_the_second_ctrl_c_kills_at_once(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(WAITING)
    process, _ = start(script)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGTERM)  # the launcher's, on its way out
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    process.communicate()


# ----------------------------------------------------------------------------------------------------------
# Loader processes

TRAINER = """
import multiprocessing, os, sys, time
from caco_scale.run.signals import Signals, end_with_trainer, shielded

import torch
from torch.utils.data import DataLoader, IterableDataset

class Numbers(IterableDataset):
    def __iter__(self):
        for i in range(10**9):
            yield torch.tensor(i)

if __name__ == "__main__":
    signals = Signals().install()
    multiprocessing.set_forkserver_preload(["torch"])
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=2, multiprocessing_context="forkserver",
        persistent_workers=True, worker_init_fn=end_with_trainer,
    )
    with shielded():
        batches = iter(loader)
    next(batches)
    print("pids", *[worker.pid for worker in batches._workers], flush=True)
    while signals.requested is None:
        next(batches)
    # A checkpoint takes its time, and data must go on meanwhile: workers notice a dead fork server after 5 seconds.
    until = time.time() + (0 if "fails" in __file__ else 6)
    while time.time() < until:
        next(batches)
        time.sleep(0.02)
    print("checkpoint written after", signals.requested, flush=True)
    if "fails" in __file__:
        raise ValueError("with its loader still open")
"""


def start_trainer(script):
    script.write_text(TRAINER)
    process = start_command([sys.executable, script], stderr=subprocess.PIPE)
    return process, pids_of(process)


@pytest.mark.parametrize("name", ["stops.py", "fails.py"])
def test_loader_processes_survive_a_signal_to_the_whole_group(tmp_path, name):
    script = tmp_path / name
    process, workers = start_trainer(script)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert output == "checkpoint written after SIGTERM\n", errors
    assert process.returncode == (1 if name == "fails.py" else 0)
    wait_until_gone(workers)


def test_loader_processes_end_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "trainer.py"
    process, workers = start_trainer(script)
    assert all(is_running(pid) for pid in workers)
    process.kill()
    wait_until_gone(workers)
    process.communicate()


# ----------------------------------------------------------------------------------------------------------
# The launcher


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGKILL"])
def test_a_trainer_writes_its_checkpoint_when_only_its_launcher_is_signalled(tmp_path, name):
    script = tmp_path / "train.py"
    script.write_text(WAITING)
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    launcher, (trainer,) = start(script, *launch)
    launcher.send_signal(getattr(signal, name))
    output, errors = launcher.communicate(timeout=60)
    assert output == "SIGTERM\ncheckpoint written\n", errors
    wait_until_gone([trainer])


def test_launchers_are_known_by_name():
    known = (
        "/usr/bin/accelerate",
        "torchrun",
        "accelerate.commands.launch",
        "torch.distributed.run",
        "deepspeed",
    )
    assert all(LAUNCHER.fullmatch(word) for word in known)
    assert not any(LAUNCHER.fullmatch(word) for word in ("bash", "accelerate_my_run.sh", "python3.11", "-m"))
