"""Parquet files (Hugging Face's, or others) as a source: images as they are stored, bytes not re-encoded.

Parquet is read row group by row group, while a build reads images in random order. So the images are copied once
to one file in the scratch folder, and read from there by offset. Which files are one split is judged by their names
(:func:`split_of`), what is in them by ``data_prep.parquet_columns``.

Memory: one page of the images' column and one image at a time, whatever a file claims. A file whose images would take
more than MOST_GROWTH times its bytes (and more than SMALL_BYTES) is refused.
"""

import contextlib
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from caco_scale.atomic import write_atomically
from caco_scale.data.folders import File, Listing
from caco_scale.data.splits import some_names, split_kind
from caco_scale.errors import UserError, one_line, quoted
from data_prep.destination import FULL_DISK, SCRATCH_FILES, free_space, path_of, unnamed_file
from data_prep.parquet_columns import Columns, find_columns
from data_prep.tar import TarSource

# train-00000-of-00003.parquet, and with a hash at its end as older data sets have it.
PART = re.compile(r"(?P<name>.*?)-(?P<number>\d+)-of-(?P<total>\d+)(-\w+)?")
NUMBERED = re.compile(r"(?P<name>.*?)[-_.]?(?P<number>\d+)")  # 0000.parquet, train_0.parquet
PACKED, NOTE = SCRATCH_FILES
BUFFER_BYTES = 1 << 20
SMALL_BYTES, MOST_GROWTH = 1 << 30, 20


class ParquetSource(TarSource):
    """The images of a parquet file, or of one split of a folder of them.

    image_column, label_column: see :func:`~data_prep.parquet_columns.find_columns`. missing_files: take the split even
    where its own names say that files are missing. UserError: no files, several splits and none chosen, missing files.
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
            self.files = [str(Path(path, file)) for file in _chosen(path, split)]
            if not missing_files:
                _check_complete(path, self.files)
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
            _check_claims(path, file.metadata)
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


def _check_claims(path, metadata):
    """UserError for a group of rows that would unpack to many times its bytes: its pages are unpacked whole."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in (group.column(i) for i in range(group.num_columns)):
            claimed = column.total_uncompressed_size
            if claimed > max(SMALL_BYTES, MOST_GROWTH * column.total_compressed_size):
                raise UserError(
                    f"{path}: {column.total_compressed_size:,} bytes of its column {column.path_in_schema} claim to "
                    f"unpack to {claimed:,}: it is no file of stored images"
                )


def split_of(file: str) -> str | None:
    """The split of a parquet file by its path below the source; None: its names tell of none.

    ``train-00000-of-00003.parquet``, ``train_0.parquet``, ``train.parquet``, ``default/train/0000.parquet``.
    """
    *folders, name = Path(file).with_suffix("").parts
    if (part := PART.fullmatch(name)) and part["name"]:
        return part["name"]
    if split_kind(name):
        numbered = NUMBERED.fullmatch(name)
        return numbered["name"] if numbered else name
    return next((folder for folder in reversed(folders) if split_kind(folder)), None)


def _chosen(path, split):
    """The files of the one split that there is or that is asked for, below ``path``. UserError: not one."""
    below = Path(path)
    files = sorted(str(file.relative_to(below)) for file in below.rglob("*.parquet") if file.is_file())
    of = defaultdict(list)
    for file in files:
        if not any(part.startswith(".") for part in Path(file).parts):
            of[split_of(file)].append(file)
    if split is not None:
        names = [name for name in of if name == split] or [
            name for name in of if name and split_kind(name) == (split_kind(split) or "")
        ]
        if len(names) != 1:
            there = some_names(sorted(filter(None, of)), 8) or "none"
            raise UserError(f"{path} has no parquet files of the split {split} (its splits: {there})")
        return _one_folder(path, of[names[0]], split)
    if not files:
        raise UserError(f"{path} has no parquet files")
    splits = sorted(filter(None, of))
    if len(splits) > 1:
        raise UserError(
            f"{path} has {len(splits)} splits ({some_names(splits, 8)}), which are no one set: choose one with --split"
        )
    if splits and None in of:
        raise UserError(
            f"{path} has files of the split {splits[0]} and others of none ({some_names(of[None])}), which are no one "
            f"set: choose it with --split {quoted(splits[0])}, or move the others away"
        )
    return _one_folder(path, next(iter(of.values())), splits[0] if splits else None)


def _one_folder(path, files, split):
    """The files of a split, if they lie in one folder: two are two configurations of a data set. UserError: two."""
    folders = sorted({os.path.dirname(file) for file in files})
    if split is not None and len(folders) > 1:
        raise UserError(
            f"{path} has the split {split} {len(folders)} times (in {some_names(folders)}), which are no one set: give "
            f"one of these folders, {quoted(os.path.join(path, folders[0]))}"
        )
    return files


def _check_complete(path, files: Iterable[str]):
    """UserError where the numbers in the files' names say that some are missing, or there twice."""
    groups = defaultdict(list)
    for file in files:
        stem = Path(file).stem
        match = PART.fullmatch(stem) or NUMBERED.fullmatch(stem)
        if match:
            total = match.groupdict().get("total")
            groups[os.path.dirname(file), match["name"], total].append((int(match["number"]), stem))
    if len({(folder, name) for folder, name, _ in groups}) != len(groups):
        raise UserError(f"{path} has files of two versions of a split (-of- different numbers): remove one")
    for (_, name, total), numbers in groups.items():
        there = sorted(number for number, _ in numbers)
        first = min(there[0], 1) if total is None else int(int(total) in there)
        if total is None and there[0] > 1:
            continue  # years, say
        expected = range(first, int(total) + first) if total else range(first, max(there[-1] + 1, first))
        if len(expected) > len(there) + 1_000_000:
            raise UserError(
                f"{path}: {numbers[0][1]} is one of {len(expected):,} files, {len(there):,} are there"
            )
        missing = sorted(set(expected) - set(there))
        if missing:
            of = f"{name or 'numbers'}: {len(there):,} of {len(expected):,} files"
            raise UserError(
                f"{path} has not all files of {of}; missing: {some_names(list(map(str, missing)), 5)}: download them, "
                "or pass --missing-files to take what is there"
            )
        if len(set(there)) != len(there) or len(there) > len(expected):
            raise UserError(
                f"{path} has {len(there):,} files for the {len(expected):,} of {name or 'numbers'} (such as "
                f"{numbers[0][1]}): two versions lie there, remove one"
            )
