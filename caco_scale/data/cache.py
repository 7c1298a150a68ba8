"""Whole shards kept on a node's own disk, shared by every process of the node and by several jobs.

A file's name is the sha256 of its content, so that equal shards are one file whatever set they belong to. Beside
``<sha256>.tar`` lies ``<sha256>.ok``: who last checked the content, by the file's identity (inode, size, times
of change, boot of the machine). A file that is not as its note says is hashed again before it is used, so that
damage is found once and not at every opening. The note's own time is that of the last opening, by which the
oldest goes first when the limit is reached.

A download is ``<sha256>.part``: locked while it lasts, of full size from its start (so that it counts against the
limit), renamed when its hash is right.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from caco_scale.data.counters import Counters
from caco_scale.errors import UserError

HASH_BYTES = 4 << 20
ENTRY = r"([0-9a-f]{64})\.(tar|part)"  # nothing else in the directory is ours to remove
FREE_SHARE = 0.8  # of the disk's free space, taken when no limit is given


class ShardCache:
    """The cache in ``directory``, of at most ``limit_bytes`` (0: four fifths of what is free there).

    Evictions and damaged copies are added to ``counters``. UserError where the directory cannot be made or written.
    """

    def __init__(self, directory: str | os.PathLike, limit_bytes: int = 0, counters: Counters | None = None):
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self.counters = counters or Counters()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
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

    def open(self, sha256: str, num_bytes: int) -> io.FileIO | None:
        """The shard as a file open for reading, its content checked; None if it is not here."""
        try:
            file = io.FileIO(self.path(sha256))
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
            os.utime(self.path(sha256, ".ok"))
        return file

    def _is_good(self, file, sha256, num_bytes):
        identity = _identity(file)
        if identity[1] != num_bytes:
            return False
        try:
            if json.loads(self.path(sha256, ".ok").read_text()) == identity:
                return True
        except (OSError, ValueError):
            pass
        digest = hashlib.sha256()
        for start in range(0, num_bytes, HASH_BYTES):
            digest.update(os.pread(file.fileno(), HASH_BYTES, start))
        if digest.hexdigest() != sha256:
            return False
        self._note(sha256, identity)
        return True

    def _note(self, sha256, identity):
        path = self.path(sha256, ".ok")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(identity))
            os.replace(temporary, path)

    def drop(self, sha256: str) -> None:
        """Forget a shard; who has it open reads on."""
        for suffix in (".tar", ".ok"):
            with contextlib.suppress(OSError):
                self.path(sha256, suffix).unlink()

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
                if self.path(sha256).exists():
                    return True
                if part is None or not self._make_room(num_bytes, part):
                    return False
                self._fill(part, sha256, num_bytes, chunks)
                return True
        except OSError as error:
            raise self._broken(error) from None

    def _broken(self, error):
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
        self._note(sha256, _identity(part))

    @contextlib.contextmanager
    def _download(self, sha256, wait):
        """``<sha256>.part`` empty, open and locked, or None when another process has it; gone at the end."""
        path = self.path(sha256, ".part")
        while True:
            # Not truncated yet: it may be another's.
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_at(file, path):
                    break
            except BlockingIOError:
                file.close()
                yield None
                return
            file.close()  # the one before us has finished it
        with file:
            try:
                file.truncate(0)
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()

    def _make_room(self, num_bytes, part):
        """Evict the longest unopened until ``num_bytes`` more fit, and reserve them; False if they cannot."""
        with open(self.directory / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self._entries(part)
            total = sum(size for _, _, size in entries)
            for _, path, size in entries:
                if total + num_bytes <= self.limit_bytes:
                    break
                if path.suffix == ".tar":
                    self.drop(path.stem)
                    self.counters.add("evictions")
                    total -= size
                elif _remove_abandoned(path):
                    total -= size
            if total + num_bytes > self.limit_bytes:
                return False
            part.truncate(num_bytes)
            return True

    def _entries(self, besides=None):
        """(last opening, path, bytes) of shards and downloads, the longest unopened first."""
        entries = []
        for entry in os.scandir(self.directory):
            path = Path(entry.path)
            if not re.fullmatch(ENTRY, entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            if not (besides and _is_at(besides, path)):
                with contextlib.suppress(FileNotFoundError):
                    size, opened = entry.stat().st_size, entry.stat().st_mtime
                    with contextlib.suppress(FileNotFoundError):
                        opened = path.with_suffix(".ok").stat().st_mtime
                    entries.append((opened, path, size))
        return sorted(entries)


class UnusableCache(UserError):
    """The disk refuses to keep what came, or to show what it keeps."""


class DamagedDownload(UserError):
    """What came is not what the manifest names."""


def _identity(file):
    """What changes when a file is written, replaced, or may have lost data with the machine's power."""
    status = os.fstat(file.fileno())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, boot]


def _is_at(file, path):
    """Is the open file still the one at ``path``?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(path):
    """Remove the download of a killed process; False if a process is still at it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)  # while it is locked: nobody begins it anew meanwhile
            return True
    except (BlockingIOError, FileNotFoundError):
        return False
