"""Every file below a folder, listed by several threads, in a fixed order; no file is a Python object that stays.

Symbolic links are followed once: a folder that two ways lead to (a link back up, two links to one place) is listed by
one of them, whatever the threads' timing, real folders first and then links by name; so is a file. What is left out
is named.
"""

import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco_scale.errors import UserError

THREADS = 16  # a network disk answers many at once
SAY_SECONDS = 10
NO_IMAGE = "its name is not an image's"
MOST_SKIPPED = 1000  # files that are no images, by name

Identity = tuple[int, int]  # of a file or a folder: its device, its number there


def hidden(name: str) -> bool:
    """Is a part of a name that of a file of the system, such as ``.DS_Store`` and ``__MACOSX``?"""
    return name[:1] == "." or name == "__MACOSX"


@dataclass(slots=True)
class _Run:
    """Files of one folder that stand in a row: their names below the top joined, and of each what is known."""

    names: bytes
    lengths: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    numbers: NDArray[np.uint64]  # on their device
    links: dict[int, Identity]  # place in the run -> what the file, a link, leads to


@dataclass(slots=True)
class Folder:
    """A folder: its name below the top ("" the top itself), its files and folders in their order."""

    name: str
    identity: Identity
    content: list["_Run | str"] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)  # folders in it that are links
    skipped: list[tuple[str, str]] = field(default_factory=list)
    num_skipped: int = 0
    most_skipped: int = MOST_SKIPPED

    @property
    def num_files(self) -> int:
        return sum(len(run.sizes) for run in self.content if isinstance(run, _Run))

    def folders(self) -> Iterator[str]:
        """Those in it that are no links."""
        links = set(self.linked)
        return (name for name in self.content if isinstance(name, str) and name not in links)

    def skip(self, name: str, reason: str) -> None:
        self.num_skipped += 1
        if len(self.skipped) < self.most_skipped:
            self.skipped.append((name, reason))


@dataclass
class Scan:
    """The files below a folder in the order of their top folders, then of their names; n of them.

    names: all names, "/" between folders, one behind another in UTF-8 (what is not UTF-8 on the disk as it is there);
    lengths (n,): of each; sizes (n,): bytes of each file, 0 where they were not asked for; folders: all folders
    {name: files directly in it}, the first of them "" ; skipped: (name, reason) of the first that are left out,
    ``num_skipped`` in all.
    """

    names: bytes
    lengths: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    folders: dict[str, int]
    skipped: list[tuple[str, str]]
    num_skipped: int

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(name, size) of every file."""
        end = 0
        for length, size in zip(self.lengths.tolist(), self.sizes.tolist(), strict=True):
            yield self.names[end : end + length].decode("utf-8", "surrogateescape"), size
            end += length

    def top_of_each(self) -> list[tuple[str, int]]:
        """[(top folder, its number of files)] in the files' order, "" for those in none."""
        found: dict[str, int] = {}
        for name, count in self.folders.items():
            top = name.partition("/")[0]
            found[top] = found.get(top, 0) + count
        return list(found.items())


def scan(
    path: str,
    wanted: Callable[[str], bool],
    sizes: bool = True,
    say: Callable[[str], object] | None = None,
    most_skipped: int = MOST_SKIPPED,
) -> Scan:
    """The files below ``path`` that are ``wanted`` by their names; hidden ones are passed over without a word.

    Args:
        sizes: whether to ask for the size of each, which costs most of the time.
        say: given a line now and then.
        most_skipped: how many of those that are left out are named.
    Raises:
        UserError: a folder that cannot be read.
    """
    reader = _Reader(path, wanted, sizes, say, most_skipped)
    try:
        found = reader.read_all()
    except OSError as error:  # a link that has gone since
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    finally:
        reader.close()
    return _joined(found, most_skipped)


class _Reader:
    """Reads folders by threads; a folder's own folders are read once it is."""

    def __init__(self, path, wanted, sizes, say, most_skipped):
        self.path, self._wanted, self._sizes, self._say = path, wanted, sizes, say
        self._most_skipped = most_skipped
        self._pool, self._results = ThreadPoolExecutor(THREADS), queue.SimpleQueue()
        self._stop = threading.Event()
        self._said, self._num_files, self._num_folders = time.monotonic(), 0, 0

    def close(self):
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def read_all(self) -> dict[str, Folder]:
        """{name: folder}. Links to folders are looked at when all that is met before them is known."""
        found, seen = self._below([""]), set()
        seen.update(folder.identity for folder in found.values())
        links = [name for folder in found.values() for name in folder.linked]
        while links:
            roots, claimed = [], set()
            for name in sorted(links):
                identity = _identity(os.path.join(self.path, name))
                if identity in seen or identity in claimed:
                    found[""].skip(name, "a link to a folder that is listed already")
                else:
                    claimed.add(identity)
                    roots.append(name)
            below, links = self._below(roots), []
            for name in sorted(below, key=lambda name: name.split("/")):  # a folder before those in it
                folder = below[name]
                if folder.identity in seen:
                    if name.rpartition("/")[0] in found:
                        found[""].skip(name, "a folder that is listed already")
                    continue
                seen.add(folder.identity)
                found[name] = folder
                links += folder.linked
        return found

    def _below(self, names):
        """{name: folder} of these folders and all in them, but for links to folders."""
        found, waiting = {}, 0
        for name in names:
            self._pool.submit(self._work, name)
            waiting += 1
        while waiting:
            folder = self._results.get()
            if isinstance(folder, BaseException):
                raise folder
            found[folder.name] = folder
            waiting -= 1
            for name in folder.folders():
                self._pool.submit(self._work, name)
                waiting += 1
            self._progress(folder)
        return found

    def _progress(self, folder):
        self._num_files += folder.num_files
        self._num_folders += 1
        if self._say and time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            self._say(
                f"listing {self.path}: {self._num_files:,} images in {self._num_folders:,} folders so far"
            )

    def _work(self, name):
        try:
            if not self._stop.is_set():
                self._results.put(self._read(name))
        except OSError as error:
            where = error.filename or os.path.join(self.path, name)
            self._results.put(UserError(f"cannot read {where}: {error.strerror}"))
        except BaseException as error:
            self._results.put(error)

    def _read(self, name):
        """One folder."""
        path = os.path.join(self.path, name) if name else self.path
        folder = Folder(name, _identity(path), most_skipped=self._most_skipped)
        prefix = name and name + "/"
        files, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if hidden(name):
                    continue
                if _leads_nowhere(entry):
                    folder.skip(prefix + name, "a link to itself")
                elif entry.is_dir():
                    folders.append(name)
                    if entry.is_symlink():
                        folder.linked.append(prefix + name)
                elif not entry.is_file():
                    folder.skip(prefix + name, "broken link or not a regular file")
                elif not self._wanted(name):
                    folder.skip(prefix + name, NO_IMAGE)
                elif entry.is_symlink():
                    status = entry.stat()
                    files.append((name, status.st_size, 0, (status.st_dev, status.st_ino)))
                else:
                    files.append((name, entry.stat().st_size if self._sizes else 0, entry.inode(), None))
        _fill(folder, prefix, files, folders)
        return folder


def _leads_nowhere(entry):
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
        raise
    return False


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _fill(folder, prefix, files, folders):
    """Bring a folder's files and folders in their order: that of whole names, at the top files come first."""
    files.sort()
    if not folder.name:
        folder.content = [*([_run(prefix, files)] if files else []), *sorted(folders)]
        return
    start = 0
    for name in sorted(folders, key=lambda name: name + "/"):
        stop = start
        while stop < len(files) and files[stop][0] < name + "/":
            stop += 1
        if stop > start:
            folder.content.append(_run(prefix, files[start:stop]))
        folder.content.append(prefix + name)
        start = stop
    if start < len(files):
        folder.content.append(_run(prefix, files[start:]))


def _run(prefix, files):
    names = [(prefix + file[0]).encode("utf-8", "surrogateescape") for file in files]
    return _Run(
        b"".join(names),
        np.fromiter(map(len, names), np.uint32, len(names)),
        np.fromiter((file[1] for file in files), np.int64, len(files)),
        np.fromiter((file[2] for file in files), np.uint64, len(files)),
        {place: file[3] for place, file in enumerate(files) if file[3]},
    )


def _joined(found: dict[str, Folder], most_skipped: int) -> Scan:
    """All folders' files in one row, a folder's own where its name stands."""
    runs: list[tuple[Folder, _Run]] = []
    folders: dict[str, int] = {}
    waiting: list[Any] = [found[""]]  # folders, and (folder, what is in it)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Folder):
            folders[item.name] = 0
            content = [(item, part) for part in item.content]
            waiting += reversed(content)
            continue
        folder, part = item
        if isinstance(part, _Run):
            folders[folder.name] += len(part.sizes)
            runs.append((folder, part))
        elif part in found:
            waiting.append(found[part])
    kept = _once(runs)
    for folder, _, keep in kept:
        folders[folder.name] -= int(len(keep) - keep.sum())
    skipped = sorted(skipped for folder in found.values() for skipped in folder.skipped)[:most_skipped]
    lengths = [run.lengths[keep] for _, run, keep in kept]
    sizes = [run.sizes[keep] for _, run, keep in kept]
    return Scan(
        b"".join(run.names if keep.all() else _names_of(run, keep) for _, run, keep in kept),
        np.concatenate(lengths) if lengths else np.empty(0, np.uint32),
        np.concatenate(sizes) if sizes else np.empty(0, np.int64),
        folders,
        skipped,
        sum(folder.num_skipped for folder in found.values()),
    )


def _once(runs):
    """[(folder, run, which of its files to keep)]: a link goes where its file, or an earlier link to it, is listed."""
    targets = {target for _, run in runs for target in run.links.values()}
    numbers, seen = np.array(sorted({number for _, number in targets}), np.uint64), set()
    if targets:
        for folder, run in runs:
            for place in np.flatnonzero(np.isin(run.numbers, numbers)).tolist():
                if place not in run.links:
                    seen.add((folder.identity[0], int(run.numbers[place])))
    kept = []
    for folder, run in runs:
        keep, ends = np.ones(len(run.sizes), bool), None
        for place, target in run.links.items():
            if target in seen:
                keep[place] = False
                ends = np.cumsum(run.lengths) if ends is None else ends
                name = run.names[int(ends[place] - run.lengths[place]) : int(ends[place])]
                folder.skip(
                    name.decode("utf-8", "surrogateescape"), "a link to a file that is listed already"
                )
            seen.add(target)
        kept.append((folder, run, keep))
    return kept


def _names_of(run, keep):
    ends = np.cumsum(run.lengths)
    starts = ends - run.lengths
    return b"".join(run.names[int(starts[i]) : int(ends[i])] for i in np.flatnonzero(keep))
