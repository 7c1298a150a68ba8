"""Tables and pages of pictures about rows of a file of features."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from caco_scale.atomic import write_atomically
from caco_scale.data.loader import evaluation_batches
from caco_scale.data.pixels import picture_note
from caco_scale.data.store import open_store
from caco_scale.data.thumbnails import data_uri
from caco_scale.embed.files import FeatureFile
from caco_scale.errors import UserError, quoted
from caco_scale.report.templates import render
from caco_scale.run.files import cannot_write, check_target

KINDS = (".csv", ".html")
MOST_ROWS, MOST_PICTURES = 200, 24  # of a page, and of a row of it


class Picture(NamedTuple):
    """One image of a page. ``other``: it is of another class than the first of its row."""

    name: str
    caption: str
    uri: str = ""
    other: bool = False


class Row(NamedTuple):
    """One row of a page: the first picture is what the others are compared with."""

    title: str
    note: str
    pictures: Sequence[Picture]


def check_outputs(paths: Sequence[str], flag: str) -> dict[str, str]:
    """The files of a flag by their endings, ``{".csv": path}``; UserError for others and for those that exist."""
    found = {}
    for path in paths:
        kind = Path(path).suffix.lower()
        if kind not in KINDS:
            raise UserError(f"{flag} {path} ends in neither .csv (a table) nor .html (a page of pictures)")
        if kind in found:
            raise UserError(f"{flag} has two files that end in {kind}: {found[kind]} and {path}")
        refuse_existing(path, flag)
        found[kind] = path
    return found


def refuse_existing(path: str, flag: str) -> None:
    """UserError for a file that is there, or that cannot be."""
    check_target(path, flag)
    if os.path.lexists(path):
        raise UserError(f"{flag} {path} exists: rm {quoted(path)}, or give another name")


def write(path: str | Path, data: bytes) -> None:
    """A file, whole or not at all."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise cannot_write(Path(path), error) from None


def write_table(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV of dicts with the same names; floats with all their digits."""
    text = io.StringIO()
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, row.keys())
            writer.writeheader()
        writer.writerow(row)
    write(path, text.getvalue().encode())


def write_page(path: str, title: str, lines: Sequence[str], rows: Sequence[Row]) -> None:
    """An HTML page that needs nothing but itself."""
    write(path, render("embed/show.html", title=title, lines=lines, rows=rows))


def pictures_of(
    file: FeatureFile, indexes: Iterable[int], data: str | None, cache_dir: str
) -> tuple[dict[int, str], str]:
    """Images of a file's set by their numbers there -> ({number: data URI}, a note on them or what is wrong, or "").

    ``data``: where the set is now, None: where it was. UserError where ``data`` is given and is not that set.
    """
    address, request = data or file.about["data"], file.about["request"]
    try:
        store = open_store(address, cache_dir, flag="--data", pixels=file.pixels)
        if store.fingerprint() != request["images"]:
            raise UserError(f"{address} has changed since {file.path} was written, or is another set")
    except UserError as error:
        if data:
            raise
        return {}, f"No pictures: {error}; --data says where the images are now."
    numbers = np.unique(np.fromiter(indexes, np.int64))
    batches = evaluation_batches(
        store,
        request["size"],
        rank=0,
        world_size=1,
        batch_size=64,
        workers=0,
        ids=numbers,
        resize=request["resize"],
        undecodable=[],
    )
    found = {}
    for ids, crops, _ in batches:
        found |= {int(i): data_uri(np.asarray(crop)) for i, crop in zip(ids, crops, strict=True)}
    return found, picture_note(file.pixels)


def class_name(file: FeatureFile, label: int) -> str:
    """The class of an image in words, "" where it has none."""
    classes = file.about["classes"]
    return classes[label] if 0 <= label < len(classes) else ""
