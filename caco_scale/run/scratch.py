"""What a process leaves behind when it is killed in the middle: its folder for sockets, its semaphores.

multiprocessing makes both by chance names (``pymp-*``, ``/dev/shm/sem.mp-*``), and who is killed with its whole group
removes neither. Ours carry a name that is held by a lock as long as the process lives: the next start takes the locks
that it gets for those of the dead.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from multiprocessing import process
from pathlib import Path

from caco_scale.errors import at_end

SEMAPHORES = Path("/dev/shm")
LOCK = ".lock"

_own: tuple[Path, int, int] | None = None  # folder, the descriptor whose lock is held, process


def use_own_names() -> None:
    """Give multiprocessing in this process a folder and a prefix of its own, and clear those of the dead.

    Where the temporary folder cannot be used, multiprocessing keeps its own ways (and its own errors).
    """
    global _own
    if _own is not None:
        return
    with contextlib.suppress(OSError):
        base = Path(tempfile.gettempdir())
        folder, descriptor = _make(base)
        _own = folder, descriptor, os.getpid()
        settings = process.current_process()._config  # ty: ignore[missing-attribute]
        settings["tempdir"], settings["semprefix"] = str(folder), f"/mp-{folder.name}"
        at_end(_remove_own)
        _clear(base)


def _prefix():
    return f"caco-{os.getuid()}-"


def _make(base):
    while True:
        folder = base / f"{_prefix()}{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(
            BlockingIOError
        ):  # another start holds it, and is about to remove the folder
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / LOCK).exists():
                return folder, descriptor
        os.close(descriptor)


def _clear(base):
    """Remove what the dead have left; only our user's, only what nobody holds."""
    for folder in base.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for semaphore in SEMAPHORES.glob(f"sem.mp-{folder.name}-*"):
                    semaphore.unlink(missing_ok=True)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _remove_own():
    if _own is not None and os.getpid() == _own[2]:  # not in a fork of it
        shutil.rmtree(_own[0], ignore_errors=True)  # multiprocessing's tracker sees to the semaphores
