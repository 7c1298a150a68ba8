"""Files that appear complete or not at all, also when the process or the machine stops."""

import contextlib
import errno
import os


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write, which replaces ``path`` when the block ends well and leaves it alone otherwise.

    On disk afterwards: the bytes, and the folder's entry for them. Raises OSError as ``open`` and ``write`` do.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    flush_to_disk(os.path.dirname(path) or ".")


def flush_to_disk(path):
    """Have the disk hold a file's bytes or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders.
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def write_atomically(path, data):
    """Replace a file by the bytes ``data``; see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)
