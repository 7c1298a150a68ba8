"""The directory of a shard set while it is built: who writes it, what it holds, what can go wrong with it.

``DST/.build`` holds what was asked (``build.json``) and a record of every finished shard. It is removed when
``manifest.json`` is there.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from caco_scale.atomic import write_atomically
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.store.local import LocalStore
from caco_scale.errors import UserError

STATE_DIR = ".build"
SCRATCH_FILES = ("source.tar", "source.json")  # in it: a source that was unpacked, and what it was made of
SCRATCH_LOCK = ".lock"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"{number:06d}.tar"


def check_apart(src: str, dst: str) -> None:
    """UserError for a destination inside its source: its shards would become images of the next build."""
    source, target = os.path.realpath(src), os.path.realpath(dst)
    if os.path.isdir(source) and (target == source or target.startswith(source.rstrip("/") + "/")):
        raise UserError(f"the destination {dst} lies inside the source {src}: choose a directory outside it")


@contextmanager
def destination_errors(dst: str) -> Generator[None, None, None]:
    """An OSError of writing becomes one line; reading the source raises a UserError of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"no space for {dst}: {error.strerror}; {free_space(dst)}; free some and run it again"
            ) from None
        raise UserError(f"cannot write to {dst}: {error.strerror} ({error.filename})") from None


def free_space(path: str) -> str:
    """Words for the free space of the disk that holds ``path``, which need not exist."""
    path = os.path.abspath(path)  # its parents end at /
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return f"{shutil.disk_usage(path).free / 1e6:,.1f} MB are free there"


@contextmanager
def locked(dst: str, wait: bool = False, shared: bool = False) -> Generator[None, None, None]:
    """Hold the lock of a destination, so that two builds never write it at once; makes ``dst/.build``.

    ``shared``: with others that build other parts of it.
    """
    state = os.path.join(dst, STATE_DIR)
    path = os.path.join(state, "lock")
    while True:
        os.makedirs(state, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below; the lock lives as long as the file)
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another build is writing {dst}: wait for it, or stop it and run this again"
            ) from None
        file.close()  # the holder before us removed the directory when it had finished
    with file:
        yield


@contextmanager
def scratch_removed(dst: str, existed: bool) -> Generator[None, None, None]:
    """Remove the decompressed source when a build fails before its first shard (say, an empty class)."""
    try:
        yield
    except UserError:
        state = Path(dst, STATE_DIR)
        begun = any(
            re.fullmatch(r"\d{6}\.json", path.name) for path in Path(dst).glob(f"**/{STATE_DIR}/*.json")
        )
        if state.is_dir() and not begun:
            for name in SCRATCH_FILES:
                (state / name).unlink(missing_ok=True)
            if {path.name for path in state.iterdir()} <= {"lock"}:
                shutil.rmtree(state)
            if not existed and not any(Path(dst).iterdir()):
                os.rmdir(dst)
        raise


@contextmanager
def scratch_folder(purpose: str) -> Generator[str, None, None]:
    """A folder in the temporary directory, ``caco-PURPOSE-...``, removed at the end: its path.

    A killed process leaves its folder behind. So a folder holds a lock while its process lives, and who makes one
    removes those of this user whose lock nobody holds.
    """
    _remove_left_scratch(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix=f"caco-{purpose}-", ignore_cleanup_errors=True) as folder:
        with open(os.path.join(folder, SCRATCH_LOCK), "w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder


def _remove_left_scratch(temporary):
    with suppress(OSError):
        for entry in list(os.scandir(temporary)):
            if not re.fullmatch(r"caco-(build|repair|benchmark)-\w+", entry.name) or not entry.is_dir(
                follow_symlinks=False
            ):
                continue
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            with suppress(OSError):  # without a lock it is just being made, or not ours
                descriptor = os.open(
                    os.path.join(entry.path, SCRATCH_LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
                )
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(descriptor)


def unnamed_file() -> BinaryIO:
    """A file in the temporary directory that has no name: whatever ends its process, nothing of it is left."""
    return tempfile.TemporaryFile(prefix="caco-build-")


def path_of(file: BinaryIO) -> str:
    """A path by which this process and those that it starts can open a file without a name, while it is open here."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def finished_manifest(dst: str, what: dict) -> Manifest | None:
    """The manifest in ``dst`` if it is this build's and all files are there; None if there is work to do.

    UserError when ``dst`` holds another build, finished or not. Damaged shards of a finished build are
    forgotten: it becomes an unfinished build that keeps the good ones.
    """
    state = os.path.join(dst, STATE_DIR, "build.json")
    if os.path.exists(os.path.join(dst, MANIFEST_NAME)):
        store = LocalStore(dst)
        same_build(dst, store.manifest.build, what)
        try:
            store.check()
        except UserError:
            return None
        return store.manifest
    if os.path.exists(state):
        with open(state, encoding="utf-8") as file:
            same_build(dst, json.load(file), what)
    elif os.path.exists(os.path.join(dst, shard_name(0))):
        raise UserError(
            f"{dst} holds {shard_name(0)}, but not from a build of this program: choose another directory"
        )
    return None


def same_build(dst: str, there: dict, here: dict) -> None:
    """UserError that lists what differs between the build in ``dst`` and the one asked for."""
    if there == here:
        return
    names = {"num_images": "images in the source", "listing": "source listing"}
    differ = [
        names.get(key, key.replace("_", " "))
        + ("" if key == "listing" else f" {there.get(key)} there, {here.get(key)} now")
        for key in {**here, **there}
        if there.get(key) != here.get(key)
    ]
    raise UserError(f"{dst} holds another build ({'; '.join(differ)}): choose another directory or remove it")


def prepare_destination(dst: str, what: dict) -> None:
    """Make ``dst/.build`` ready; the good shards of a damaged finished build become its finished shards."""
    state = os.path.join(dst, STATE_DIR)
    os.makedirs(state, exist_ok=True)
    for folder in (dst, state):
        for name in os.listdir(folder):
            if name.endswith(".tmp"):  # of a killed run
                os.unlink(os.path.join(folder, name))
    path = os.path.join(dst, MANIFEST_NAME)
    write_atomically(os.path.join(state, "build.json"), json.dumps(what).encode())
    if os.path.exists(path):
        manifest = LocalStore(dst).manifest
        for number, info in enumerate(manifest.shards):
            notes = {
                kind: [n for n in getattr(manifest, kind) if (n["key"] or "").startswith(info.name + "/")]
                for kind in ("fixed", "rejected")
            }
            write_record(state, number, {"info": asdict(info), **notes})
        os.unlink(path)


def record_name(number: int) -> str:
    """The name of a finished shard's record, below the destination."""
    return f"{STATE_DIR}/{number:06d}.json"


def record_path(state: str, number: int) -> str:
    """Where the record of a finished shard lies."""
    return os.path.join(state, f"{number:06d}.json")


def write_record(state: str, number: int, record: dict) -> None:
    """Note that a shard is finished: {"info": ..., "fixed": [...], "rejected": [...]}."""
    write_atomically(record_path(state, number), json.dumps(record).encode())


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
