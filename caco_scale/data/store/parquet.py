"""Parquet files that hold images, Hugging Face's or others, read in place.

A group of rows takes the place of a shard, and is read and unpacked whole for an image of it; the last ones are kept.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from caco_scale.data.addresses import local_path
from caco_scale.data.counters import Counters
from caco_scale.data.folders import is_image
from caco_scale.data.listed_files import Listings, Rows, listed, refuse_size
from caco_scale.data.parquet_columns import Columns, find_columns, holds_images
from caco_scale.data.parquet_files import check_claims, check_complete, chosen, files_by_split
from caco_scale.data.scan import THREADS, hidden
from caco_scale.data.shard_index import ShardIndex, smallest
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import Manifest
from caco_scale.data.splits import some_names
from caco_scale.data.store.base import InPlaceStore
from caco_scale.errors import UserError, one_line, quoted

MOST_GROUP_BYTES = 1 << 30  # unpacked
KEPT_BYTES = 256 << 20  # of unpacked groups in each process
MOST_FOLDERS = 1000  # that are looked into for a first parquet file or image
OPEN_FILES = 64


class _Group(NamedTuple):
    """A group of rows: its file, its number and its first row there, rows, bytes of images when unpacked."""

    file: int
    number: int
    first_row: int
    num_rows: int
    num_bytes: int


def parquet_splits(path: str) -> list[str] | None:
    """The splits of a folder of parquet files that hold images, [] where names tell of none; None: it is none."""
    return None if not _holds_parquet(path) else sorted(filter(None, files_by_split(path)))


def _holds_parquet(path):
    """Is a file of images in parquet the first to be met below the folder, and no image?"""
    waiting, looked = [path], 0
    while waiting and looked < MOST_FOLDERS:
        here = waiting.pop(0)
        looked += 1
        try:
            entries = sorted(
                (e for e in os.scandir(here) if not hidden(e.name)), key=lambda entry: entry.name
            )
        except OSError:
            return False
        if any(is_image(entry.name) for entry in entries):
            return False
        files = [entry.path for entry in entries if entry.name.endswith(".parquet")]
        if files and holds_images(files[0]):
            return True
        waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return False


class ParquetStore(InPlaceStore):
    """The images of a parquet file, or of one split of a folder of them.

    A sample's key is its file and its row there; the hash of a group is one of the file's name and size.

    UserError: several splits, missing files, columns that nobody can tell, groups of rows that are too large.
    """

    pickled = ("url", "manifest", "path", "_files", "_sizes", "_groups", "_columns", "_labels")

    def __init__(
        self,
        url: str,
        path: str,
        split: str | None = None,
        counters: Counters | None = None,
        listings: Listings | None = None,
    ):
        self.url = url
        self._begin(counters or Counters())
        try:
            self._open(path, split, listings)
        except UserError as error:
            if "--" not in str(error):
                raise
            more = f" --split {quoted(split)}" if split else ""
            raise UserError(
                f"{error}; that is for `python -m data_prep build --format parquet{more} {quoted(path)} SHARDS`, "
                "whose shards to give then"
            ) from None
        listed(listings, "parquet", local_path(url), partial(_rows, self._files, self._sizes))

    @property
    def rgb_command(self) -> str:
        there = os.path.exists(
            local_path(self.url)
        )  # else it is a split's address, which build does not know
        return f"python -m data_prep build --format parquet --rgb {quoted(self.url)} SHARDS" if there else ""

    def _open(self, path, split, listings):
        if os.path.isfile(path):
            self.path, self._files = os.path.dirname(path), [os.path.basename(path)]
        else:
            splits = parquet_splits(path) or []
            if split is None and len(splits) > 1:
                raise UserError(
                    f"{self.url} has {len(splits)} splits ({some_names(splits, 8)}): give one of them, "
                    f"{quoted(os.path.join(self.url, splits[0]))}"
                )
            self.path, self._files = path, chosen(path, split)
            check_complete(path, [os.path.join(path, file) for file in self._files])
        places = [os.path.join(self.path, file) for file in self._files]
        self._columns = find_columns(places, None, None)
        self._sizes = [os.path.getsize(place) for place in places]
        read = partial(_groups_and_labels, places, self._columns)
        asked = (*places, *self._sizes, self._columns)
        self._groups, classes, self._labels = listings.once(asked, read) if listings else read()
        if not self._groups:
            raise UserError(f"{self.url} has no rows: give parquet files with images")
        self.manifest = self._describe(classes)

    def _describe(self, classes):
        infos = []
        for number, group in enumerate(self._groups):
            said = [self._files[group.file], self._sizes[group.file], group.number, group.num_rows]
            digest, name = hashlib.sha256(json.dumps(said).encode()).hexdigest(), f"{number:06d}"
            infos.append(ShardInfo(name, group.num_rows, group.num_bytes, digest, name, 0, digest))
        labels = np.concatenate(self._labels)
        counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        return Manifest(
            classes=tuple(classes),
            class_counts=tuple(counts.tolist()),
            num_samples=sum(group.num_rows for group in self._groups),
            num_bytes=sum(group.num_bytes for group in self._groups),
            shards=ShardTable(infos),
            fixed=[],
            rejected=[],
            build={},
        )

    def _begin(self, counters):
        super()._begin(counters)
        self._lock = threading.Lock()
        self._open_files: OrderedDict[int, Any] = OrderedDict()
        self._unpacked: OrderedDict[int, Any] = OrderedDict()
        self._unpacked_bytes = 0

    @property
    def repair_hint(self) -> str:
        return f"replace these rows in {self.url}, or leave them out"

    def _load_index(self, shard: int) -> ShardIndex:
        group, file = self._groups[shard], self._files[self._groups[shard].file]
        rows = range(group.first_row, group.first_row + group.num_rows)
        keys, count = [f"{file}/{row}" for row in rows], group.num_rows
        nothing = np.zeros(count, np.int8)
        arrays = {
            **{
                "starts": smallest(np.arange(count)),
                "sizes": nothing,
                "extension": nothing,
                "offset": nothing,
            },
            **{"labels": smallest(self._labels[group.file][rows.start : rows.stop]), "size": nothing},
            **{"key_ends": smallest(np.cumsum([len(key) for key in keys]))},
            **{"member_ends": smallest(np.arange(1, count + 1))},
        }
        return self._keep_index(shard, ShardIndex("".join(keys), ("jpg",), arrays))

    def read_sample(self, shard: int, position: int) -> dict[str, Any]:
        return {"__key__": self.index(shard).keys[position], "jpg": self.read(shard, position, 0)}

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """The image of row ``start`` of a group; nothing where it has none."""
        with self._lock:
            column = self._unpacked.pop(shard, None)
            if column is None:
                column = self._unpack(shard)
                self._unpacked_bytes += column.nbytes
            self._unpacked[shard] = column
            while self._unpacked_bytes > KEPT_BYTES and len(self._unpacked) > 1:
                self._unpacked_bytes -= self._unpacked.popitem(last=False)[1].nbytes
        return column[start].as_py() or b""

    def _unpack(self, shard):
        """The images' column of a group of rows."""
        group = self._groups[shard]
        place = os.path.join(self.path, self._files[group.file])
        import pyarrow

        try:
            file = self._open_files.pop(group.file, None) or self._opened(group.file, place)
            self._open_files[group.file] = file
            if len(self._open_files) > OPEN_FILES:
                self._open_files.popitem(last=False)[1].close()
            table = file.read_row_group(group.number, columns=self._columns.leaves[:1], use_threads=False)
            column = table.column(0).combine_chunks()
            if self._columns.nested:
                column = column.field("bytes")
            if len(column) != group.num_rows:
                raise ValueError(f"{len(column)} rows")
        except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
            raise UserError(f"cannot read {place}: {one_line(error)}: put the good file back") from None
        return column

    def _opened(self, number, place):
        import pyarrow.parquet as parquet

        if (size := os.path.getsize(place)) != self._sizes[number]:
            raise refuse_size(place, size, self._sizes[number])
        return parquet.ParquetFile(place)


def _rows(files, sizes, _):
    """The parquet files themselves, as a listing has them."""
    names = [os.fsencode(file) for file in files]
    labels = np.full(len(files), -1, np.int32)
    about = {"classes": [], "skipped": []}
    return Rows(b"".join(names), np.array([len(n) for n in names]), np.array(sizes, np.int64), labels, about)


def _look(path: str, columns: Columns) -> tuple[list[tuple[int, int, int, int]], list]:
    """((number, first row, rows, bytes of images) of every group, the label of every row) of a file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            check_claims(path, file.metadata)
            groups, first = [], 0
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                chunks = (group.column(i) for i in range(group.num_columns))
                unpacked = sum(
                    c.total_uncompressed_size for c in chunks if c.path_in_schema == columns.leaves[0]
                )
                groups.append((number, first, group.num_rows, unpacked))
                first += group.num_rows
                if unpacked > MOST_GROUP_BYTES and group.num_rows > 1:
                    raise UserError(
                        f"{path} has {group.num_rows:,} rows of {unpacked / 1e9:,.1f} GB in one group, which would be "
                        "unpacked whole for each image: build shards of it with --format parquet"
                    )
            if columns.label is None:
                return groups, [None] * first
            return groups, file.read(columns=[columns.label]).column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as images with labels: {one_line(error)}") from None


def _groups_and_labels(
    places: Sequence[str], columns: Columns
) -> tuple[list[_Group], list[str], list[np.ndarray]]:
    """(the groups with rows, classes, the place of each row's label among them by file; -1: none) of some files."""
    with ThreadPoolExecutor(THREADS) as pool:
        looked = list(pool.map(partial(_look, columns=columns), places))
    groups = [_Group(n, *group) for n, (found, _) in enumerate(looked) for group in found]
    labels = [of_file for _, of_file in looked]
    classes, place_of = columns.class_places({label for of_file in labels for label in set(of_file)})
    numbers = [np.array([place_of.get(x, -1) for x in of_file], np.int32) for of_file in labels]
    return [group for group in groups if group.num_rows], classes, numbers
