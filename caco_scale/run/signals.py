"""Signals that ask a run to stop: they set a flag, and all ranks act on it together at a step boundary.

SIGUSR1, SIGTERM and the first SIGINT (Ctrl-C) mean: write a checkpoint at the next step and end well. The
second SIGINT kills at once. Nothing heavy is imported, so that the handlers stand before torch is.

Who is sent a signal is not always who should be. A cluster signals every process of a job step;
``accelerate launch`` passes a SIGTERM or SIGINT on to the whole process group of each trainer (and kills
what still runs after 30 seconds), dies of a SIGUSR1 that it was not told to handle, and, where it started
one process only, dies of any of them without a word to that process. So the trainer follows its launcher
(:func:`follow_launcher`) and shields its loader processes (:func:`shielded`, :func:`end_with_trainer`),
without which no checkpoint could be reached.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from multiprocessing import connection, resource_tracker
from typing import Self

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
GROUP_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR2)  # what may be sent to a job's every process
LAUNCHER = re.compile(
    r"(.*/)?(accelerate|accelerate-launch|torchrun|deepspeed)"  # the commands
    r"|accelerate\.commands\.\w+|torch\.distributed\.(run|launch)|deepspeed\.launcher\.\w+"  # python -m ...
)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Signals:
    """``requested`` is the name of the first stop signal that arrived (``"SIGTERM"``), or None.

    A command says ``signals = Signals().install()`` before torch is imported, and ``signals.retire()`` at its good
    end. What runs inside another program says ``with Signals() as signals:``, which puts the handlers back that it
    found, and leaves a second Ctrl-C to them. Only a main thread can take signals over: in another one none is seen.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted = False
        self._found: dict = {}  # the handlers to put back

    def install(self) -> Self:
        """Take over SIGUSR1, SIGTERM and SIGINT of this process -> self."""
        if _in_main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)
            follow_launcher()
        return self

    def retire(self) -> None:
        """The command has ended in good order: a late SIGUSR1 must not kill the exiting interpreter."""
        if _in_main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def __enter__(self) -> Self:
        if _in_main_thread():
            self._found = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}
        return self.install()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._found = {}

    def _handle(self, number, frame):
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(signal.SIGINT, self._found.get(signal.SIGINT, signal.SIG_DFL))
                signal.raise_signal(signal.SIGINT)
            self._interrupted = True
        self.requested = self.requested or signal.Signals(number).name


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


def follow_launcher() -> None:
    """Have the kernel send this process SIGTERM when the launcher that started it dies (Linux; else nothing).

    Only a launcher: a trainer that a shell started outlives the shell under ``nohup``.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(
        LAUNCHER.fullmatch(word) for word in words[:4]
    )  # its own first words, not the script's arguments


@contextlib.contextmanager
def shielded() -> Generator[None]:
    """Processes started inside (loader workers, their fork server) never see the stop signals.

    They would die of a signal that was meant for the trainer, and take the last checkpoint with them.
    Signals that arrive meanwhile are delivered afterwards. What blocks SIGTERM can only be killed: that is
    done when the trainer exits.
    """
    atexit.unregister(_kill_children)
    atexit.register(_kill_children)  # before multiprocessing's own, which would wait for them for ever
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    # multiprocessing's tracker ignores SIGTERM and SIGINT, and would die of the others; its start unblocks the two.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_children():
    for child in multiprocessing.active_children():
        child.kill()


def end_with_trainer(worker_id: int | None = None) -> None:
    """In a loader worker (as its ``worker_init_fn``): stay shielded; exit when the trainer is gone, however killed.

    Under a fork server the worker's parent is the server, which lives as long as any worker does; torch's own
    watchdog, which watches the parent, then never fires.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "end_with_trainer is for processes that multiprocessing started"

    signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)

    def watch():
        connection.wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="trainer-watch", daemon=True).start()
