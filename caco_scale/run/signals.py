"""Signals that ask a run to stop: they set a flag, and all ranks act on it together at a step boundary.

SIGUSR1, SIGTERM, SIGHUP (the terminal is gone) and the first SIGINT (Ctrl-C) mean: write a checkpoint at the next step
and end well, which is said at once; before the first step, where there is nothing to save: end at once. The second
SIGINT kills at once, with a line on what that costs.
Nothing heavy is imported, so that the handlers stand before torch is.

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
from collections.abc import Callable, Generator
from multiprocessing import connection, resource_tracker
from typing import Self

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GROUP_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR2)  # what may be sent to a job's every process
LAUNCHER = re.compile(
    r"(.*/)?(accelerate|accelerate-launch|torchrun|deepspeed)"  # the commands
    r"|accelerate\.commands\.\w+|torch\.distributed\.(run|launch)|deepspeed\.launcher\.\w+"  # python -m ...
)
Answer = Callable[[str, bool], object]  # a signal's name; whether it is a second Ctrl-C
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Signals:
    """``requested`` is the name of the first stop signal that arrived (``"SIGTERM"``), or None.

    A command says ``signals = Signals().install()`` before torch is imported, and ``signals.retire()`` at its good
    end. What runs inside another program says ``with Signals() as signals:``, which puts the handlers back that it
    found, and leaves a second Ctrl-C to them. Only a main thread can take signals over: in another one none is seen.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted = self._is_command = False
        self._answer: Answer | None = None
        self._found: dict = {}  # the handlers to put back

    def install(self) -> Self:
        """Take over SIGUSR1, SIGTERM, SIGINT and SIGHUP of this process, whose command this is -> self."""
        self._is_command = True
        return self._take_over()

    def _take_over(self):
        if _in_main_thread():
            for number in STOP_SIGNALS:
                if not _is_under_nohup(number):
                    signal.signal(number, self._handle)
            follow_launcher()
        return self

    def retire(self) -> None:
        """The command has ended in good order: a late SIGUSR1 must not kill the exiting interpreter."""
        if _in_main_thread():
            for number in (signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def ending_at_once(self) -> Generator[None]:
        """Within it a stop signal ends a command, with a line and exit code 0: there is nothing to save yet.

        By a thread: the main one may be in torch's rendezvous, or in a read from a silent disk, where Python runs no
        handler. No clean-up is lost: what a start writes appears whole or not at all.
        """
        if not (self._is_command and _in_main_thread()):
            yield
            return
        with _watched(_end_before_the_first_step):
            if self.requested:  # while torch was imported
                _end_before_the_first_step(self.requested)
            yield

    @contextlib.contextmanager
    def telling(self, answer: Answer) -> Generator[None]:
        """Within it the user hears at once what the first stop signal will do, and what a second Ctrl-C has cost.

        Args:
            answer: called with a signal's name and False of the first, by a thread, for the main one may compute for
                long in one call; with True before a second Ctrl-C ends the process.
        """
        if not _in_main_thread():
            yield
            return
        once = threading.Lock()

        def tell(name):
            if once.acquire(blocking=False):
                answer(name, False)

        self._answer = answer
        try:
            if self.requested:
                tell(self.requested)
            with _watched(tell):
                yield
        finally:
            self._answer = None

    def __enter__(self) -> Self:
        if _in_main_thread():
            self._found = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}
        return self._take_over()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._found = {}

    def _handle(self, number, frame):
        if number == signal.SIGINT:
            if self._interrupted:
                if self._answer:
                    self._answer("SIGINT", True)
                signal.signal(signal.SIGINT, self._found.get(signal.SIGINT, signal.SIG_DFL))
                signal.raise_signal(signal.SIGINT)
            self._interrupted = True
        self.requested = self.requested or signal.Signals(number).name


@contextlib.contextmanager
def _watched(tell):
    """Within it ``tell`` gets the name of every stop signal that arrives, at once and in a thread."""

    def watch():
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in STOP_SIGNALS:
                    tell(signal.Signals(number[0]).name)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="stop-watch", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # and the thread ends


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


def _is_under_nohup(number):
    """Whether SIGHUP is to stay ignored, as the shell's ``nohup`` has it.

    torchrun handles it nevertheless, and passes it on to its trainers, in sessions of their own, on its way out.
    """
    ignored = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
    return ignored and "TORCHELASTIC_RUN_ID" not in os.environ


def _end_before_the_first_step(name):
    if os.environ.get("RANK", "0") == "0":
        print(
            f"stopped by {name} before the first step: there was nothing to save, the same command starts again"
        )
        sys.stdout.flush()
    os._exit(0)


class Interrupted(KeyboardInterrupt):
    """A stop signal, where it ends a program as Ctrl-C does. ``code``: the exit code that shells give it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def interrupting() -> Generator[None]:
    """Within it SIGTERM and SIGHUP (unless ignored) interrupt as Ctrl-C does: files are closed, folders removed."""
    if not _in_main_thread():
        yield
        return

    def interrupt(number, frame):
        raise Interrupted(number)

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in found.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler or signal.SIG_DFL)


def follow_launcher() -> None:
    """Have the kernel send this process SIGTERM when the launcher that started it dies (Linux; else nothing).

    Only a launcher: a trainer that a shell started outlives the shell under ``nohup``.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not launcher_words(parent):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def launcher_words(pid: int) -> list[str]:
    """The command line of a process that is a launcher; empty for another one, and where that cannot be known."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        return []
    is_launcher = any(map(LAUNCHER.fullmatch, words[:4]))  # its own first words, not the script's arguments
    return words if is_launcher else []


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
