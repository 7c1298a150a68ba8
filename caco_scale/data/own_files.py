"""Files of this user's own in a folder that other users may write, too.

Whatever else lies under a name of ours (a link, a FIFO, a folder, another's file) is not followed, waited for, read or
written: it is a :class:`NotOurs`.
"""

import errno
import io
import os
import stat
import tempfile
from pathlib import Path


class NotOurs(OSError):
    """Under a name of ours lies something else; ``filename`` says where, ``strerror`` what it is."""


def what_else(status: os.stat_result) -> str:
    """What something is, in words, if it is not a plain file of this user; else empty."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        return KINDS.get(kind, "a device")
    if status.st_uid != os.geteuid():
        return f"a file of another user (number {status.st_uid})"
    return ""


KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def open_own(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """The plain file of this user at ``path``, to read, with ``os.O_RDWR`` to write, too; new ones have mode 600.

    :class:`NotOurs` where something else is there, other OSErrors as ``open`` gives them. Never waits.
    """
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if isinstance(error, FileNotFoundError | FileExistsError):
            raise
        check_own(path)
        raise
    file = io.FileIO(number, "r+" if flags & os.O_RDWR else "r")
    if problem := what_else(os.fstat(number)):
        file.close()
        raise NotOurs(errno.EPERM, problem, str(path))
    return file


def nameless_file() -> int:
    """The descriptor of a new file in memory, of which only what is written takes any; it ends with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("caco-scale")
    with tempfile.TemporaryFile() as file:  # a Python built for an old libc
        return os.dup(file.fileno())


def others_may_write(file: io.IOBase) -> bool:
    """May users other than the owner of an open file write it?"""
    return bool(os.fstat(file.fileno()).st_mode & OTHERS_WRITE)


def check_own(path: Path) -> bool:
    """Is there a file at ``path``? :class:`NotOurs` where something else is."""
    try:
        problem = what_else(os.lstat(path))
    except FileNotFoundError:
        return False
    if problem:
        raise NotOurs(errno.EPERM, problem, str(path))
    return True


def own_folder(path: Path, name: str) -> Path:
    """``path``, made for this user alone if it is not there; where others keep files in it, the folder ``name`` in it.

    OSError where it cannot be made; :class:`NotOurs` for a folder that every user may write and rename in, and for
    something else under ``name``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    shared = status.st_mode & stat.S_IWOTH
    if shared and not status.st_mode & stat.S_ISVTX:
        raise NotOurs(errno.EPERM, "a folder that every user may write", str(path))
    if not shared and os.geteuid() in (0, status.st_uid):
        return path
    return private_folder(path / name)


def private_folder(path: Path) -> Path:
    """The folder ``path``, made for this user alone if it is not there; :class:`NotOurs` for anything else."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        problem = f"not a directory of this user ({os.geteuid()})"
    else:
        problem = "a folder that other users may write" if status.st_mode & OTHERS_WRITE else ""
    if problem:
        raise NotOurs(errno.EPERM, problem, str(path))
    return path
