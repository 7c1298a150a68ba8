"""Small files that a start reads whole, manifests and indexes: regular ones, up to a size, within a time.

And what bytes are that are not what they should be: a login page, a compressed file, a pointer of Git LFS.
"""

import errno
import io
import os
import stat
import time

from caco_scale.errors import UserError

MAX_MANIFEST_BYTES = 512 << 20  # some three million notes on images that were fixed or rejected
MAX_INDEX_BYTES = 1 << 30  # of one shard
SMALL_SECONDS = 120  # for all of a small file, and
SMALL_BYTES_PER_SECOND = 100_000  # as much more as it takes at this rate
CHUNK_BYTES = 1 << 20

COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\x00": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"PK\x03\x04": "unzip",
}


def seconds_for(num_bytes: int, seconds: float = SMALL_SECONDS) -> float:
    """How long so many bytes of a small file may take, from its beginning."""
    return seconds + num_bytes / SMALL_BYTES_PER_SECOND


def open_regular(path: str) -> io.FileIO:
    """Open a file to read. OSError for what is none: a FIFO would wait for its writer, a device never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return io.FileIO(descriptor)


def read_small(path: str, most_bytes: int) -> bytes:
    """The bytes of a small local file. OSError where it cannot be read; UserError for too large or too slow a one."""
    start, data = time.monotonic(), bytearray()
    with open_regular(path) as file:
        refuse_large(path, os.fstat(file.fileno()).st_size, most_bytes)
        while chunk := os.read(file.fileno(), CHUNK_BYTES):
            data += chunk
            refuse_large(path, len(data), most_bytes)
            refuse_slow(path, len(data), time.monotonic() - start)
    return bytes(data)


def refuse_large(where: str, num_bytes: int, most_bytes: int) -> None:
    """UserError for more bytes than such a file may have."""
    if num_bytes > most_bytes:
        raise UserError(
            f"{where} has {num_bytes:,} bytes or more, at most {most_bytes:,} are read: is it the right file?"
        )


def refuse_slow(where: str, num_bytes: int, seconds: float, limit: float = SMALL_SECONDS) -> None:
    """UserError for a file that comes too slowly to wait for."""
    if seconds > seconds_for(num_bytes, limit):
        raise UserError(
            f"{where} comes too slowly: {num_bytes:,} bytes in {seconds:,.0f} seconds, {limit:,g} seconds are the "
            f"limit (and one more for each {SMALL_BYTES_PER_SECOND / 1000:,.0f} kB): check network, server and disk"
        )


def what_instead(data: bytes) -> str | None:
    """What bytes are that should be a manifest or an index, in words with what to do; None where that is not plain."""
    if not data:
        return "it is empty"
    for magic, command in COMPRESSED.items():
        if data.startswith(magic):
            return f"it is compressed: decompress it ({command}), and let a server send it as it is"
    head = data[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if (
        head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--"))
        or b"<html" in head
    ):
        return (
            "it is a web page: the server likely wants a login, or the address is that of a page; give an address that "
            "needs none, or download the set"
        )
    if head.startswith(b"<"):
        return f"it is XML, likely a store's error: {' '.join(data[:200].decode('utf-8', 'replace').split())}"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file: run git lfs pull"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16 text: write it as UTF-8"
    return None
