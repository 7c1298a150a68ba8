"""The console of a command: what becomes of it never ends the work, and nothing else is ever written into its place.

A reader goes away (``| head``), a disk is full, a terminal is closed, a stream was never open. A run's records are in
files; what cannot be printed is left out, and said once where somebody may still read it.
"""

import contextlib
import errno
import io
import os
import select
import sys
import threading
from collections.abc import Generator
from typing import Any

# Errors after which nobody will ever read: a closed pipe, a terminal that is gone.
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)
WAIT_SECONDS = 1.0  # for a terminal that another program has set to not wait
NAMES = {1: "stdout", 2: "stderr"}


@contextlib.contextmanager
def lasting_console() -> Generator[None]:
    """Within it ``sys.stdout`` and ``sys.stderr`` never raise; afterwards they are as before.

    Streams that another program has put there (a notebook's, a test's) stay: they are its own.
    """
    open_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream, fd) for stream, fd in zip(before, NAMES, strict=True))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def open_standard_files() -> None:
    """Descriptors 0 to 2 that are closed (``>&-``) become ``/dev/null``.

    Else the next file that is opened has such a number, a checkpoint's, and what C++ prints goes into it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _lasting(stream, fd):
    try:
        ours = stream is None or stream.fileno() == fd
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
        return stream
    return LastingStream(stream, fd) if ours and not isinstance(stream, LastingStream) else stream


class LastingStream:
    """A text stream on a descriptor, line by line, that leaves out what cannot be written.

    Args:
        stream: the stream that stood there; what is not about writing is asked of it. None: there was none.
        fd: 1 or 2.
    """

    _lock = threading.RLock()  # of both streams, which tell of each other

    def __init__(self, stream: Any, fd: int):
        self._stream, self._fd, self._text = stream, fd, ""
        self._said = False
        self.encoding, self.errors = getattr(stream, "encoding", None) or "utf-8", "backslashreplace"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Keep the text until its line ends."""
        with self._lock:
            self._text += text
            if "\n" in text:
                self.flush()
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is kept, or leave it out."""
        with self._lock:
            data, self._text = self._text.encode(self.encoding, self.errors), ""
            try:
                while data:
                    data = data[self._write(data) :]
            except OSError as error:
                self._lost(error)

    def _write(self, data):
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            select.select([], [self._fd], [], WAIT_SECONDS)
            return os.write(self._fd, data)

    def _lost(self, error):
        if error.errno in GONE:  # for C++ and for child processes, too
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._fd)
            os.close(null)
        elif not self._said:
            self._said = True
            other = sys.stderr if self._fd == 1 else sys.stdout
            if isinstance(other, LastingStream):
                name, why = NAMES[self._fd], os.strerror(error.errno or 0)
                other.write(f"warning: {name} cannot be written ({why}): lines are left out\n")
