"""Parquet files (Hugging Face's, or others) as a source: images as they are stored, bytes not re-encoded.

Parquet is read row group by row group, while a build reads images in random order. So the images are copied once
to one file in the scratch folder, and read from there by offset. Which files are one split, and what is in them, is
judged by ``caco_scale.data.parquet_files`` and ``parquet_columns``.

Memory: one page of the images' column and one image at a time, whatever a file claims. A file whose images would take
more than MOST_GROWTH times its bytes (and more than SMALL_BYTES) is refused.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from caco_scale.atomic import write_atomically
from caco_scale.data.folders import File, Listing
from caco_scale.data.parquet_columns import Columns, find_columns
from caco_scale.data.parquet_files import MOST_GROWTH, SMALL_BYTES, check_claims, check_complete, chosen
from caco_scale.errors import UserError, one_line
from data_prep.destination import FULL_DISK, SCRATCH_FILES, free_space, path_of, unnamed_file
from data_prep.tar import TarSource

PACKED, NOTE = SCRATCH_FILES
BUFFER_BYTES = 1 << 20


class ParquetSource(TarSource):
    """The images of a parquet file, or of one split of a folder of them.

    image_column, label_column: see :func:`~caco_scale.data.parquet_columns.find_columns`. missing_files: take the split
    even where its own names say that files are missing. UserError: no files, several splits and none chosen.
    """

    def __init__(
        self,
        path: str,
        scratch: str | os.PathLike | None,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        missing_files: bool = False,
    ):
        self.note: str | None = None
        if scratch is None:
            self._unpacked = unnamed_file()  # open as long as this is
            super().__init__(path_of(self._unpacked), path)
        else:
            self.note = os.path.join(scratch, NOTE)
            super().__init__(os.path.join(scratch, PACKED), path)
        if os.path.isfile(path):
            self.files = [path]
        else:
            self.files = [str(Path(path, file)) for file in chosen(path, split)]
            if not missing_files:
                check_complete(path, self.files)
        self.columns = image_column, label_column
        self.origin: list[list] = [
            [file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in self.files
        ]
        self.origin += [list(self.columns)] if any(self.columns) else []

    def scan(self) -> Listing:
        there: dict[str, Any] | None = None
        if self.note and os.path.exists(self.note) and os.path.exists(self.path):
            with contextlib.suppress(ValueError):  # cut short by an earlier version
                there = json.loads(Path(self.note).read_text())
        if there is None or there["origin"] != self.origin:
            there = {"origin": self.origin, **self._unpack()}
            if self.note:
                write_atomically(self.note, json.dumps(there).encode())
        listing = Listing(labelled=True)
        for name in there.get("classes", ()):
            listing.add_folder(name)
        for name, size, offset in there["files"]:
            listing.add(File(name, size, offset))
        return listing

    def _unpack(self):
        """Copy the images of all files one after another; returns their [name, bytes, offset] and the classes."""
        columns = find_columns(self.files, *self.columns)
        found, labels, offset = [], [], 0
        try:
            with open(
                self.path, "wb"
            ) as packed:  # also where it has no name: the file itself is open elsewhere
                for number, path in enumerate(self.files):
                    most = max(SMALL_BYTES, MOST_GROWTH * os.path.getsize(path)) + offset
                    for data, label in _rows(path, columns):
                        if offset + len(data) > most:
                            raise UserError(
                                f"{path} of {os.path.getsize(path):,} bytes holds more than {most - offset:,} bytes of "
                                "images: it is no file of stored images"
                            )
                        found.append([f"{number:05d}_{len(found):08d}.jpg", len(data), offset])
                        labels.append(label)
                        offset += packed.write(data)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            folder = os.path.dirname(self.path) if self.note else tempfile.gettempdir()
            raise UserError(
                f"no space for {folder} to unpack the parquet files of {self.label}: {error.strerror}; "
                f"{free_space(folder)}: free some, or set TMPDIR"
            ) from None
        folders = columns.class_folders(labels)
        for entry, label in zip(found, labels, strict=True):
            entry[0] = f"{folders[label]}/{entry[0]}" if columns.label is not None else entry[0]
        return {"files": found, "classes": sorted(set(folders.values()))}


def _rows(path, columns: Columns):
    """(image bytes, label or None) of every row of a file."""
    import pyarrow
    import pyarrow.parquet as parquet

    unreadable = (
        pyarrow.ArrowException,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        MemoryError,
    )
    row = 0
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            check_claims(path, file.metadata)
            # One row at a time: a row may be large, and many may be one value that stands in the file once.
            for batch in file.iter_batches(batch_size=1, columns=columns.leaves):
                yield columns.image_and_label(batch)
                row += 1
    except UserError:
        raise
    except unreadable as error:
        raise UserError(
            f"{path} cannot be read as images with labels: row {row:,}: {one_line(error)}"
        ) from None
