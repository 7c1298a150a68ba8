"""The batch host's side of a job: commands, signals, small files, lines of the job's output.

Standard library and Python 3.6 alone, as job.py.
"""

import os
import signal
import subprocess
import sys
import time
from typing import List, Optional

MISTAKE, NO_PROGRESS, LEFT_TO_SLURM = 2, 42, 143  # exit codes
label: str = ""  # job.restart, at the head of every line of the output


def patiently(tries: int, command: List[str]) -> Optional[str]:
    """What a command prints when it succeeds, None when it never does. The controller may restart: 10 s apart."""
    while True:
        done = run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            return done.stdout
        tries -= 1
        if tries <= 0:
            return None
        time.sleep(10)


def run(command: List[str], **options) -> "subprocess.CompletedProcess[str]":
    """A finished process; one that cannot be started has exit code 127."""
    try:
        return subprocess.run(command, universal_newlines=True, preexec_fn=as_a_child, **options)
    except OSError as error:
        say(f"{command[0]}: {error.strerror}")
        return subprocess.CompletedProcess(command, 127, "", "")


def as_a_child() -> None:
    """In a new process: it hears the signals that this one collects."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class Signals:
    """Signals are held back and taken one by one, when this program looks: none falls between two of its steps."""

    WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

    def __init__(self) -> None:
        self.held = {*self.WARNINGS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, self.held)
        for number in self.held:  # lib.sh had them ignored until here
            signal.signal(number, signal.SIG_DFL)

    def take(self, seconds: float = 0) -> str:
        """The name of one that has come, or comes within ``seconds``: USR1, USR2, TERM, CHLD, or nothing."""
        found = signal.sigtimedwait(self.held, seconds)
        return signal.Signals(found.si_signo).name[len("SIG") :] if found else ""

    def ignore_term(self) -> None:
        """From now on, in what is started, too: SLURM sends it to all of a job that it requeues."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def say(text: str, to=None) -> None:
    """A line of the job's output."""
    print("{} [{}] {}".format(time.strftime("%F %T"), label, text), file=to or sys.stdout, flush=True)


def die(text: str) -> None:
    """A mistake that no requeue fixes: one line, and the job fails."""
    say("error: " + text, sys.stderr)
    sys.exit(MISTAKE)


def read(*places: str) -> str:
    """A text file, empty where there is none."""
    try:
        with open(os.path.join(*places), encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def write(place: str, text: str, how: str = "w") -> None:
    """A text file; names that are no text of this locale stand in it as they are."""
    with open(place, how, encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)


def mtime(*places: str) -> int:
    """When a file was written, in ns; 0 where there is none."""
    try:
        return os.stat(os.path.join(*places)).st_mtime_ns
    except OSError:
        return 0
