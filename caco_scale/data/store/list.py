"""A list of images: a table of paths, and of labels if it has them, in a CSV, TSV or parquet file."""

import csv
import itertools
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import xxhash

from caco_scale.data.addresses import local_path
from caco_scale.data.counters import Counters
from caco_scale.data.listed_files import Listings, Rows, listed
from caco_scale.data.parquet_columns import Columns, paths_and_labels
from caco_scale.data.scan import THREADS
from caco_scale.data.splits import some_names
from caco_scale.data.store.listed import ListedStore
from caco_scale.errors import UserError, one_line

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*SEPARATORS, ".parquet")
CHUNK = 10_000  # rows


class ListStore(ListedStore):
    """The files that a list names, in its order where a folder has that of its names.

    A sample's key is its path as the list has it; a relative one counts from the list's folder. Labels are places among
    the labels' names, numbers by size; an image without one has -1, and so have all without a column of labels.

    UserError: no column of paths, paths that lead to no file, a file twice; ``labelled``: no labels.
    """

    def __init__(
        self,
        url: str,
        labelled: bool = False,
        counters: Counters | None = None,
        listings: Listings | None = None,
    ):
        path = local_path(url)
        files = listed(listings, "list", path, partial(_rows, url))
        super().__init__(url, os.path.dirname(path), files, counters)
        if labelled and not files.about["classes"]:
            raise UserError(
                f"{url} has no column of labels, which an evaluation needs: add one that is called label"
            )


def _rows(url, sizes):
    """The rows of a list as they are now."""
    path = local_path(url)
    base = os.path.dirname(path)
    names, labels, lengths, seen, numbers = [], [], [], [], {}
    for paths, of_each in _chunks(url, path):
        encoded = [name.encode("utf-8", "surrogateescape") for name in paths]
        names.append(b"".join(encoded))
        lengths.append(np.fromiter(map(len, encoded), np.uint32, len(encoded)))
        seen.append(np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded)))
        labels.append(
            np.fromiter((numbers.setdefault(x, len(numbers)) for x in of_each), np.int32, len(encoded))
        )
    if not lengths:
        raise UserError(f"{url} names no files: give a list with at least one row below the columns' names")
    joined, length = b"".join(names), np.concatenate(lengths)
    _refuse_twice(url, joined, length, np.concatenate(seen))
    found = _sizes(url, base, joined, length) if sizes else np.zeros(len(length), np.int64)
    classes, place_of = _classes(numbers)
    about = {"classes": classes, "skipped": []}
    return Rows(joined, length, found, place_of[np.concatenate(labels)], about, hash_labels=bool(classes))


def _chunks(url, path) -> Iterator[tuple[list[str], list]]:
    """(paths, labels or None) of some rows."""
    try:
        if path.endswith(".parquet"):
            yield from _parquet_chunks(url, path)
        else:
            with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                rows = csv.reader(file, delimiter=SEPARATORS[os.path.splitext(path)[1]])
                header = next(rows, [])
                at = [None if name is None else header.index(name) for name in _columns(url, header)]
                while chunk := list(itertools.islice(rows, CHUNK)):
                    yield tuple(_column(url, [row for row in chunk if row], place) for place in at)
    except OSError as error:
        raise UserError(f"cannot read {url}: {error.strerror or one_line(error)}") from None
    except csv.Error as error:
        raise UserError(f"{url} is no table of {os.path.splitext(path)[1][1:]}: {one_line(error)}") from None


def _column(url, rows, place):
    if place is None:
        return [None] * len(rows)
    short = next((row for row in rows if len(row) <= place), None)
    if short is not None:
        raise UserError(
            f"{url} has a row with {len(short)} columns, {place + 1} are needed: {','.join(short)[:80]}"
        )
    return [row[place] for row in rows]


def _parquet_chunks(url, path):
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(url, file.schema_arrow.names)
            for batch in file.iter_batches(CHUNK, columns=[name for name in columns if name is not None]):
                paths = batch.column(columns[0]).to_pylist()
                labels = None if columns[1] is None else batch.column(columns[1]).to_pylist()
                if not all(isinstance(name, str) for name in paths):
                    raise UserError(
                        f"{url}: the column {columns[0]!r} holds no paths: rename the one that does to path"
                    )
                yield paths, labels or [None] * len(paths)
    except pyarrow.ArrowException as error:
        raise UserError(f"{url} cannot be read as parquet: {one_line(error)}") from None


def _columns(url, names):
    path, label = paths_and_labels(names)
    if path is None:
        raise UserError(
            f"{url} has no column of paths (its columns: {some_names([n[:60] for n in names], 8) or 'none'}): its "
            "first line is to name the columns, the one of the files path, that of labels label"
        )
    return path, label


def _refuse_twice(url, names, lengths, hashes):
    _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
    if (counts > 1).any():
        number = int(firsts[np.argmax(counts > 1)])
        name = _name(names, np.cumsum(lengths, dtype=np.int64), number)
        raise UserError(
            f"{url} names {int((counts > 1).sum()):,} files more than once (such as {name}): remove the doubles; "
            "data.mix shows images of one set more often than those of another"
        )


def _name(names, ends, number):
    start = int(ends[number - 1]) if number else 0
    return names[start : int(ends[number])].decode("utf-8", "surrogateescape")


def _sizes(url, base, names, lengths):
    """Bytes of every file. UserError: some are not there."""
    ends = np.cumsum(lengths, dtype=np.int64)

    def look(start):
        found = []
        for number in range(start, min(start + CHUNK, len(ends))):
            try:
                status = os.stat(os.path.join(base, _name(names, ends, number)))
                found.append(status.st_size if stat.S_ISREG(status.st_mode) else -1)
            except (OSError, ValueError):
                found.append(-1)
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        sizes = np.concatenate([np.array(s, np.int64) for s in pool.map(look, range(0, len(ends), CHUNK))])
    missing = np.flatnonzero(sizes < 0)
    if len(missing):
        first = int(missing[0])
        raise UserError(
            f"{url}: {len(missing):,} of {len(ends):,} paths lead to no file (the first in {_place(url, first)}: "
            f"{_name(names, ends, first)}): correct them; those that do not begin with / count from {base}"
        )
    return sizes


def _place(url, number):
    """Where a row of the list stands, in words: empty lines hold none, and a quoted field may hold several lines."""
    path = local_path(url)
    if path.endswith(".parquet"):
        return f"row {number + 1:,}"
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file, delimiter=SEPARATORS[os.path.splitext(path)[1]])
        for _ in itertools.islice(filter(None, rows), number + 2):
            pass
        return f"line {rows.line_num}"


def _classes(numbers):
    """(classes in their order, the place among them of every label by its number of ``numbers``; -1: of none)."""
    labels = {label: _number(label) for label in numbers if label not in (None, "", "-1")}
    if None in labels.values():
        labels = {label: str(label) for label in labels}
    classes, place_of = Columns("", False, "label", None).class_places(labels.values())
    places = np.full(max(1, len(numbers)), -1, np.int32)
    for label, meant in labels.items():
        places[numbers[label]] = place_of.get(meant, -1)
    return classes, places


def _number(label):
    return int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()) else None
