"""How a run writes: so that ``kill -9`` at any moment leaves every file readable.

Two kinds of writing, no others. Small whole files (configuration, environment, markers) are replaced
atomically: temporary file, fsync, rename. Files that grow are JSON lines, every line handed to the kernel by
one write at once, so that a killed process loses nothing it appended; :meth:`JsonLines.sync` makes the lines
survive a machine that dies. NaN and infinities are written as ``null``: JSON has no word for them, and a plot
shows the gap.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caco_scale.atomic import write_atomically
from caco_scale.errors import UserError, quoted


def to_plain(value: Any) -> Any:
    """Plain Python for JSON: tensors and numpy become numbers and lists, NaN and infinities become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def to_json(value: Any, **options: Any) -> str:
    return json.dumps(to_plain(value), allow_nan=False, **options)


def replace_file(path: Path, text: str) -> None:
    """Replace a file by ``text``, atomically."""
    if path.is_dir():
        raise not_ordinary(path)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of replaced files; for who has the folder to itself, by a lock."""
    for leftover in folder.glob("*.tmp"):
        if re.fullmatch(r".+\.\d+\.tmp", leftover.name) and leftover.is_file():
            remove_file(leftover)


def remove_file(path: Path) -> None:
    """Remove a file where there is one. UserError where that cannot be done, or a folder has its name."""
    if path.is_dir():
        raise not_ordinary(path)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; free or fix that place and start the same command again"
    )


def check_target(path: str | os.PathLike, flag: str = "--to", is_folder: bool = False) -> None:
    """Whether a command may write a file there, asked before it works: UserError where it cannot.

    ``flag``: what has named it. ``is_folder``: it writes a directory. What it does with one that is there is its own.
    """
    path = os.fspath(path)
    above, named = str(Path(path).parent), f"{flag} {path}"
    if "://" in path:
        raise UserError(f"{named} is an address: give a path, and copy it there")
    if os.path.isdir(path) and not is_folder:
        raise UserError(f"{named} is a directory: give the name of a file in it")
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise UserError(f"{named} is no ordinary file: give the name of one to write")
    if not os.path.isdir(above):
        there = next(p for p in (above, *map(str, Path(above).parents)) if os.path.exists(p))
        fix = f"mkdir -p {quoted(above)}" if os.path.isdir(there) else f"{there} is a file, give another name"
        raise UserError(f"{named} cannot be written, for there is no directory {above}: {fix}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{named} cannot be written: {above} is not yours to write to, give another place")


def open_ordinary(path: Path, mode: str) -> Any:
    """``open`` of an ordinary file, in binary and without a buffer where it is written.

    Raises:
        UserError: a folder, a pipe or a device is there, for which ``open`` might wait for ever.
        OSError: as ``open``.
    """

    def opener(name, flags):
        descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise not_ordinary(path)
        return descriptor

    try:
        return open(path, mode, buffering=0 if "a" in mode else -1, opener=opener)
    except IsADirectoryError:
        raise not_ordinary(path) from None


def not_ordinary(path: Path) -> UserError:
    """The error of a place where there is something else than a file."""
    what = "a folder" if path.is_dir() else "a pipe or a device"
    return UserError(f"{path} is {what}, and this program keeps a file there: move it away")


class JsonLines:
    """An append-only file of JSON objects, one a line.

    A line cut by a kill stays cut: the next writer starts on a line of its own, and readers skip the fragment
    (a cut object never parses, since only its last character closes it).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_ordinary(self.path, "a+b")  # open while the run lasts
            size = self._file.seek(0, os.SEEK_END)
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._write(b"\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, record: dict) -> None:
        try:
            self._write(to_json(record).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _write(self, line):
        while line:
            line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Return only when every line appended so far is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        self._file.close()


def _parse(line):
    """The object of one line, or None where the line was cut."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_json_lines(path: str | Path) -> Iterator[dict]:
    """Yield the objects of a JSON-lines file in order; cut lines are skipped, a missing file has none."""
    if not Path(path).exists():
        return
    with open_ordinary(Path(path), "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def json_lines_backwards(path: str | Path, block: int = 1 << 16) -> Iterator[dict]:
    """Yield the objects of a JSON-lines file from the last to the first; no more is read than is asked for.

    Cut lines are skipped, a missing file has none. ``block``: bytes read at once.
    """
    if not Path(path).exists():
        return
    with open_ordinary(Path(path), "rb") as file:
        end = file.seek(0, os.SEEK_END)
        rest = []  # the parts of a line that begins further in front, the last first
        while end:
            start = max(0, end - block)
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
            for line in reversed(lines[1:]):
                record = _parse(b"".join([line, *reversed(rest)]))
                rest = []
                if record is not None:
                    yield record
            rest.append(lines[0])
            end = start
        record = _parse(b"".join(reversed(rest)))
        if record is not None:
            yield record


def last_json_line(path: str | Path) -> dict | None:
    """The last whole object of a JSON-lines file, or None; reads only the end of a long file."""
    return next(json_lines_backwards(path), None)
