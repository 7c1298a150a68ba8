"""Where images come from: the source at a path, of whatever kind.

A source has two methods: ``scan() -> Listing`` and ``read(file) -> bytes``. It is picklable: workers read by
themselves. What a listing means (splits, classes, images) is decided once, for every kind of source, by
:func:`~caco_scale.data.folders.image_folders`.
"""

import bz2
import gzip
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

from caco_scale.data.addresses import is_remote
from caco_scale.data.folders import FolderSource
from caco_scale.errors import UserError, one_line
from data_prep.destination import FULL_DISK, SCRATCH_FILES, free_space, path_of, unnamed_file
from data_prep.imagenet import FlatTarSource, TarOfTarsSource, check_md5, is_tar_of_tars, read_labels
from data_prep.parquet import ParquetSource
from data_prep.tar import Source, TarSource

COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CHUNK_BYTES = 1 << 20


def open_source(
    path: str | os.PathLike,
    scratch: str | os.PathLike | None,
    kind: str = "auto",
    labels: str | None = None,
    md5: str = "auto",
    split: str | None = None,
    **parquet: Any,
) -> Source:
    """The source at ``path``: a folder of class folders, a tar of one, ImageNet's archives, or parquet files.

    scratch: a folder for what cannot be read in place (a compressed tar, parquet), used again by the next build if it
    is whole; None: a file without a name in the temporary directory, of which a kill leaves nothing. kind: ``auto``,
    ``folder``, ``tar`` or ``parquet``. labels: for a tar of images without folders, where their classes are. md5: see
    :func:`~data_prep.imagenet.check_md5`. split: of a folder of parquet files. parquet: further options of
    :class:`~data_prep.parquet.ParquetSource`.
    """
    path = os.path.expanduser(os.fspath(path))
    if is_remote(path):
        raise UserError(f"the source {path} is not on this machine: give a folder or a tar on its disks")
    if kind == "parquet":
        if scratch is not None:
            os.makedirs(scratch, exist_ok=True)
        return ParquetSource(path, scratch, split, **parquet)
    if os.path.isdir(path):
        return FolderSource(path)
    if not os.path.exists(path):
        raise UserError(f"the source {path} does not exist: give a folder of class folders, or a tar of one")
    if os.path.isfile(path):
        check_md5(path, md5)
    decompress = compression(path)
    if labels and decompress:
        raise UserError(
            f"--labels is for an uncompressed tar of images without folders: unpack {path} to a .tar first"
        )
    if decompress:
        if scratch is None:
            return UnpackedSource(path, decompress)
        return TarSource(_decompressed(path, decompress, scratch), path)
    _check_tar(path, path)
    if labels:
        names = [os.path.basename(file.name) for file in TarSource(path, path).scan().files]
        return FlatTarSource(path, path, read_labels(labels, names))
    if is_tar_of_tars(path):
        return TarOfTarsSource(path, path)
    return TarSource(path, path)


def needs_scratch(path: str, kind: str = "auto", **_: object) -> bool:
    """Will ``open_source`` write into its scratch folder?"""
    return kind == "parquet" or compression(path) is not None


def compression(path: str) -> Callable[..., Any] | None:
    """The function that opens a compressed file, judged by its first bytes; None: not compressed."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise UserError(f"cannot read the source {path}: {error.strerror}") from None
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise UserError(
            f"{path} is compressed with zstd, which is not supported: decompress it first (zstd -d)"
        )
    return next((function for magic, function in COMPRESSIONS.items() if head.startswith(magic)), None)


def _check_tar(path, label):
    if not os.path.isfile(path):
        raise UserError(f"the source {label} is neither a folder nor a tar")
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise UserError(f"the source {label} is an empty file (0 bytes)")
    if any(head) and head[257:262] != b"ustar" and not head[148:156].strip(b"\0 ").isdigit():
        raise UserError(f"the source {label} is neither a folder nor a tar ({os.path.getsize(path):,} bytes)")


def _decompressed(path, decompress, scratch):
    """Decompress ``path`` to ``scratch/source.tar``; what a killed build left complete is used again."""
    target, note = (os.path.join(scratch, name) for name in SCRATCH_FILES)
    status = os.stat(path)
    origin = json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    if os.path.exists(note) and os.path.exists(target):
        with open(note, encoding="utf-8") as stream:
            if stream.read() == origin:
                return target
    with open(target, "wb") as unpacked:
        try:
            _decompress(path, decompress, unpacked, scratch)
        except UserError:
            os.unlink(target)
            raise
    _check_tar(target, path)
    with open(note, "w", encoding="utf-8") as stream:
        stream.write(origin)
    return target


class UnpackedSource(TarSource):
    """A compressed tar, unpacked into a file without a name: it is gone with the process that made it."""

    def __init__(self, path: str, decompress: Callable[..., Any]):
        self._unpacked = unnamed_file()
        _decompress(path, decompress, self._unpacked, tempfile.gettempdir())
        super().__init__(path_of(self._unpacked), path)
        _check_tar(self.path, path)


def _decompress(path, decompress, unpacked, folder):
    """Decompress a file into ``unpacked``, which lies in ``folder``. UserError: damaged, no space."""
    try:
        with decompress(path, "rb") as packed:
            while chunk := packed.read(CHUNK_BYTES):
                unpacked.write(chunk)
        unpacked.flush()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"no space for {folder} to decompress {path}: {error.strerror}; more than "
                f"{os.fstat(unpacked.fileno()).st_size / 1e6:,.1f} MB are needed, {free_space(folder)}: free some, or "
                "decompress it elsewhere"
            ) from None
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    except (EOFError, lzma.LZMAError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {one_line(error)}") from None
