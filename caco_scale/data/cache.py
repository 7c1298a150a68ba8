"""Whole shards kept on a node's own disk, shared by every process of the node and by several jobs.

A file's name is the sha256 of its content, so that equal shards are one file whatever set they belong to. Beside
``<sha256>.tar`` lies ``<sha256>.ok``: the hash and the size that were last checked, of which file (inode, times of
change, boot of the machine). A file that is not as its note says is hashed again before it is used, so that
damage is found once and not at every opening. The note's own time is that of the last opening, by which the
oldest goes first when the limit is reached.

A download is ``<sha256>.part``: locked while it lasts, of full size from its start (so that it counts against the
limit), renamed when its hash is right.

Other users of the machine are not trusted: only files of this user's own are opened, whatever lies under their names,
so that nobody else's note is believed and nobody else's shard is read (see ``own_files``).
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from caco_scale.data.counters import Counters
from caco_scale.data.own_files import NotOurs, check_own, open_own, others_may_write, own_folder, what_else
from caco_scale.errors import UserError

HASH_BYTES = 4 << 20
ENTRY = r"([0-9a-f]{64})\.(tar|part)"  # nothing else in the directory is ours to remove
FREE_SHARE = 0.8  # of the disk's free space, taken when no limit is given
NOTE_BYTES = 4096  # a note is shorter
LOCK_SECONDS = 60.0  # that making room may have to wait for others who make some


class ShardCache:
    """The cache in ``directory``, of at most ``limit_bytes`` (0: four fifths of what is free there).

    In a directory that other users have or may write it is a folder of this user's own in there. Evictions and damaged
    copies are added to ``counters``. UserError where the directory cannot be made or written, or where every user could
    rename what is in it.
    """

    def __init__(self, directory: str | os.PathLike, limit_bytes: int = 0, counters: Counters | None = None):
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.counters = counters or Counters()
        try:
            self.directory = own_folder(self.directory, f"caco_scale-cache-{os.geteuid()}")
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except NotOurs as error:
            raise UserError(
                f"data.cache_dir {directory}: {error.filename} is {error.strerror}: give a directory of this user's "
                f"own, such as {shlex.quote(os.path.join(directory, f'of-{os.geteuid()}'))}, or none"
            ) from None
        except OSError as error:
            raise UserError(
                f"data.cache_dir {directory} cannot be written: {error.strerror}: "
                "give another directory, or none"
            ) from None
        # Four fifths are taken once: they must not shrink while the cache itself fills the disk.
        self.limit_bytes = limit_bytes or self._four_fifths()

    def _four_fifths(self):
        held = sum(size for _, _, size in self._entries())
        return int((shutil.disk_usage(self.directory).free + held) * FREE_SHARE)

    def path(self, sha256: str, suffix: str = ".tar") -> Path:
        """Where the shard of that content is, or would be."""
        assert re.fullmatch(ENTRY, f"{sha256}.tar"), "not a sha256"
        return self.directory / f"{sha256}{suffix}"

    def check(self, hashes: Iterable[str]) -> None:
        """UserError if something that is not ours lies where these shards, their notes and downloads would."""
        names = {f"{sha256}{suffix}" for sha256 in hashes for suffix in (".tar", ".ok", ".part")} | {"lock"}
        try:
            for name in names.intersection(os.listdir(self.directory)):
                check_own(self.directory / name)
        except OSError as error:
            raise self._broken(error) from None

    def has(self, sha256: str) -> bool:
        """Is the shard here, or something in its place?"""
        return os.path.lexists(self.path(sha256))

    def open(self, sha256: str, num_bytes: int) -> io.FileIO | None:
        """The shard as a file open for reading, its content checked; None if it is not here."""
        try:
            file = open_own(self.path(sha256))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._broken(error) from None
        try:
            good = self._is_good(file, sha256, num_bytes)
        except OSError:  # a disk that does not give back what it was given
            good = False
        if not good:
            file.close()
            self.drop(sha256)
            self.counters.add("damaged")
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(sha256, ".ok"), follow_symlinks=False)
        return file

    def _is_good(self, file, sha256, num_bytes):
        note = _note(file, sha256)
        if os.fstat(file.fileno()).st_size != num_bytes or others_may_write(file):
            return False
        with contextlib.suppress(OSError), open_own(self.path(sha256, ".ok")) as written:
            if written.read(NOTE_BYTES) == note and not others_may_write(written):
                return True
        digest = hashlib.sha256()
        for start in range(0, num_bytes, HASH_BYTES):
            digest.update(os.pread(file.fileno(), HASH_BYTES, start))
        if digest.hexdigest() != sha256:
            return False
        self._write_note(sha256, note)
        return True

    def _write_note(self, sha256, note):
        """A note that is cut, or is missing because two wrote it at once, costs no more than hashing again."""
        path = self.path(sha256, ".ok")
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            with open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                file.write(note)

    def drop(self, sha256: str, file: io.FileIO | None = None) -> bool:
        """Forget a shard; who has it open reads on. ``file``: only if that is it -> was it?"""
        if file and not _is_at(file, self.path(sha256)):
            return False
        for suffix in (".tar", ".ok"):
            with contextlib.suppress(OSError):
                self.path(sha256, suffix).unlink()
        return True

    def fetch(
        self, sha256: str, num_bytes: int, chunks: Callable[[], Iterable[bytes]], wait: bool = False
    ) -> bool:
        """Fill in a shard from ``chunks()``, an iterator of its bytes.

        Returns False when it is too large for the limit, or another process is at it (``wait``: after that).
        UserError, and nothing is kept, when the bytes have another hash.
        """
        if num_bytes > self.limit_bytes:
            return False
        try:
            with self._download(sha256, wait) as part:
                if check_own(self.path(sha256)):
                    return True
                if part is None or not self._make_room(num_bytes, part):
                    return False
                self._fill(part, sha256, num_bytes, chunks)
                return True
        except OSError as error:
            raise self._broken(error) from None

    def _broken(self, error):
        if isinstance(error, NotOurs):
            return UnusableCache(
                f"data.cache_dir {self.directory}: {error.filename} is {error.strerror}, not this program's own: "
                f"`rm -r {shlex.quote(error.filename)}`, or give another directory"
            )
        return UnusableCache(
            f"data.cache_dir {self.directory}: {error.strerror}: free or fix that disk, lower data.cache_bytes, or "
            "give another directory"
        )

    def _fill(self, part, sha256, num_bytes, chunks):
        digest, got = hashlib.sha256(), 0
        for chunk in chunks():
            part.write(chunk)
            digest.update(chunk)
            got += len(chunk)
        if got != num_bytes or digest.hexdigest() != sha256:
            raise DamagedDownload(
                f"{got:,} bytes with sha256 {digest.hexdigest()[:12]} came, {num_bytes:,} with {sha256[:12]} expected"
            )
        part.flush()
        os.replace(self.path(sha256, ".part"), self.path(sha256))
        self._write_note(sha256, _note(part, sha256))

    @contextlib.contextmanager
    def _download(self, sha256, wait):
        """``<sha256>.part`` new, open and locked, or None when another process has it; gone at the end."""
        path = self.path(sha256, ".part")
        while True:
            with contextlib.suppress(FileNotFoundError):
                if not _remove_abandoned(path, wait):
                    yield None
                    return
            try:
                file = io.BufferedRandom(open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            except FileExistsError:  # another was quicker
                continue
            with contextlib.suppress(BlockingIOError):  # it was taken for an abandoned one
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    break
            file.close()
        with file:
            try:
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()

    def _make_room(self, num_bytes, part):
        """Evict the longest unopened until ``num_bytes`` more fit, and reserve them; False if they cannot."""
        with self._locked():
            entries = self._entries(part)
            total = sum(size for _, _, size in entries)
            for _, path, size in entries:
                if total + num_bytes <= self.limit_bytes:
                    break
                if path.suffix == ".tar":
                    self.drop(path.stem)
                    self.counters.add("evictions")
                    total -= size
                elif _remove_if_abandoned(path):
                    total -= size
            if total + num_bytes > self.limit_bytes:
                return False
            part.truncate(num_bytes)
            return True

    @contextlib.contextmanager
    def _locked(self):
        """Alone among those who make room. Whoever holds the lock for longer than that takes is not one of them."""
        with open_own(self.directory / "lock", os.O_RDWR | os.O_CREAT) as lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(
                            errno.EDEADLK, f"its lock was held for {LOCK_SECONDS:g} seconds"
                        ) from None
                    time.sleep(0.02)
            yield

    def _entries(self, besides=None):
        """(last opening, path, bytes) of shards and downloads, the longest unopened first."""
        entries = []
        for entry in os.scandir(self.directory):
            path = Path(entry.path)
            if not re.fullmatch(ENTRY, entry.name) or (besides and _is_at(besides, path)):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if what_else(status):
                    continue
                opened = status.st_mtime
                with contextlib.suppress(FileNotFoundError):
                    opened = os.lstat(path.with_suffix(".ok")).st_mtime
                entries.append((opened, path, status.st_size))
        return sorted(entries)


class UnusableCache(UserError):
    """The disk refuses to keep what came, or to show what it keeps."""


class DamagedDownload(UserError):
    """What came is not what the manifest names."""


def _note(file, sha256):
    """What was checked, and all that changes when a file is written, replaced, or may have lost data with the power."""
    status = os.fstat(file.fileno())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    identity = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, boot
    return json.dumps([sha256, status.st_size, *identity]).encode()


def _is_at(file, path):
    """Is the open file still the one at ``path``?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(path, wait=False):
    """Remove the download of a killed process; False if a process is at it (``wait``: after that there is none)."""
    with open_own(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if _is_at(file, path):
            path.unlink(missing_ok=True)  # while it is locked: nobody begins it anew meanwhile
        return True


def _remove_if_abandoned(path):
    try:
        return _remove_abandoned(path)
    except OSError:
        return False
