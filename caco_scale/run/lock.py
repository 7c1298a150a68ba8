"""One process at a time in a folder: a run's, or an evaluation's."""

import contextlib
import fcntl
import os
import time
import weakref
from typing import IO

from caco_scale.errors import UserError

LOCK_SECONDS = 10
_held: weakref.WeakSet[IO] = weakref.WeakSet()


def be_alone(lock: IO, complaint: str) -> None:
    """Hold the lock of an open file until this process ends, however: two in one folder would undo each other's work.

    Raises UserError (``complaint``) where another process holds it, after a while: one that was just killed may linger.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _held.add(lock)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(complaint) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return None


def is_held(path: str | os.PathLike) -> bool:
    """Does a process on this machine, or as the file system sees it, hold the lock of a file?"""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _let_go():
    """In a fork of this process: it may outlive it (ClearML's does), and would hold the lock as long."""
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go)
