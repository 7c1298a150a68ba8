"""A published list of images, one name a line as in SimCLR's ``1percent.txt``, as sample numbers of a set.

A name is looked for among the keys of the samples (the paths of a folder, the names that a foreign set kept), then
among the original names that ``data_prep build`` notes in every sample's ``json``.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.folders import IMAGE_EXTENSIONS
from caco_scale.data.store.base import Store
from caco_scale.distributed.collectives import gather_objects
from caco_scale.errors import UserError

MAX_BYTES = 256 << 20
NOTES = (
    "source",
    "filename",
    "file_name",
    "path",
)  # fields of a json that name the original; ours is the first


def read_list(path: str) -> tuple[list[str], str]:
    """(the names, each once, in the file's order; the file's sha256 in hex). UserError where it is no list."""
    if not os.path.isfile(path):
        raise UserError(
            f"--list {path} is not a file: give a text file with the name of an image on every line"
        )
    if os.path.getsize(path) > MAX_BYTES:
        raise UserError(f"--list {path} has more than {MAX_BYTES >> 20} MB: it is not a list of names")
    try:
        with open(path, "rb") as file:
            data = file.read()
        lines = data.decode().split("\n")
    except OSError as error:
        raise UserError(f"cannot read --list {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--list {path} is not text: byte {error.start:,} is not UTF-8") from None
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise UserError(f"--list {path} names no image: give one a line, like n02484975_1.JPEG")
    return names, hashlib.sha256(data).hexdigest()


def find_listed(
    store: Store, path: str, names: Sequence[str], rank: int, world_size: int
) -> NDArray[np.int64]:
    """Numbers of the images of ``store`` that a list names, ascending. Collective: every rank looks at some shards.

    A name is compared without its ending and, as far as both have them, with its folders.

    Raises:
        UserError: on every rank: names that no image has, or that several have.
    """
    found: dict[str, list[int]] = {}
    for look in (_keys, _originals):
        missing = [name for name in names if name not in found]
        parts = gather_objects(_matches(look(store, rank, world_size), missing) if missing else [])
        for name, number in sorted(pair for part in parts for pair in part):
            found.setdefault(name, []).append(number)
    total = store.manifest.num_samples
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"--list {path}: {len(missing):,} of {len(names):,} names are not among the {total:,} images of "
            f"{store.url} ({_some(missing)}): give --data the set that the list is of"
        )
    several = [name for name in names if len(found[name]) > 1]
    if several:
        raise UserError(
            f"--list {path}: {len(several):,} of {len(names):,} names fit several images of {store.url} "
            f"({_some(several)}): put their folders before them, like class/name.jpg"
        )
    return np.unique([numbers[0] for numbers in found.values()]).astype(np.int64)


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _parts(name):
    """Folders and name without an image's ending, the last first."""
    folders = name.replace("\\", "/").split("/")
    stem, dot, ending = folders[-1].rpartition(".")
    return [stem if dot and ending.lower() in IMAGE_EXTENSIONS else folders[-1], *reversed(folders[:-1])]


def _matches(images: Iterable[tuple[int, str]], names: Sequence[str]) -> list[tuple[str, int]]:
    """(name, number) of every image that one of ``names`` fits."""
    wanted: dict[str, list[tuple[str, list[str]]]] = {}
    for name in names:
        parts = _parts(name)
        wanted.setdefault(parts[0], []).append((name, parts))
    matches = []
    for number, original in images:
        parts = _parts(original)
        for name, listed in wanted.get(parts[0], ()):
            if all(a == b for a, b in zip(listed, parts, strict=False)):
                matches.append((name, number))
    return matches


def _shards(store, rank, world_size) -> Iterator[tuple[int, int]]:
    """(shard, number of its first image) of this rank's part."""
    first = 0
    for shard, info in enumerate(store.manifest.shards):
        if shard % world_size == rank:
            yield shard, first
        first += info.num_samples


def _keys(store, rank, world_size):
    """(number, key) of this rank's part of the images."""
    for shard, first in _shards(store, rank, world_size):
        yield from enumerate(store.index(shard).keys, first)


def _originals(store, rank, world_size):
    """(number, original name) of this rank's part of the images, as far as their json says."""
    for shard, first in _shards(store, rank, world_size):
        names = originals_of(store, shard, range(len(store.index(shard).keys)))
        yield from ((first + position, name) for position, name in names.items())


def originals_of(store: Store, shard: int, positions: Iterable[int]) -> dict[int, str]:
    """{position: original name} of samples of one shard, of those whose json says it."""
    index, notes = store.index(shard), []
    for position in positions:
        start = index.span(position)[0]
        members = [member for member in index.members(position) if member[0] == "json"]
        notes += [(position, (shard, start + offset, size)) for _, offset, size in members]
    if not notes:
        return {}
    store.fetch(shard)
    read = store.concurrently(lambda place: store.read(*place), [place for _, place in notes])
    found = ((position, _original(data)) for (position, _), data in zip(notes, read, strict=True))
    return {position: name for position, name in found if name}


def _original(data):
    try:
        note = json.loads(data)
    except (ValueError, RecursionError):
        return None
    names = (
        [note[field] for field in NOTES if isinstance(note.get(field), str)] if isinstance(note, dict) else []
    )
    return names[0] if names else None
