"""Images to evaluate on: a shard set, or a folder of class folders, or some of either, behind one interface.

The loader asks a store for ``manifest``, ``index(shard)`` and ``read(shard, start, num_bytes)``; what it calls a shard
need not be a tar.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np

from caco_scale.data.order import permutation
from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardInfo
from caco_scale.data.store import Store, open_store
from caco_scale.errors import UserError

FOLDER_ORDER = 79  # sets the order of a folder's files apart from other orders
BLOCK_FILES = 1000
PREFETCH_SHARE = 0.5  # of a shard's images that must be wanted before fetching all of it pays


def open_images(url, flag, **options):
    """The store of a shard set or of a folder of class folders. ``flag``: the option that gave ``url``.

    ``options``: of :func:`~caco_scale.data.store.open_store`. UserError: neither, damaged, no images in it.
    """
    if not url:
        raise UserError(f"{flag} is empty: give a shard set or a folder of class folders")
    if os.path.isdir(url) and not _is_shard_set(url) and _folders(url):
        store = FolderStore(url)
    else:
        store = open_store(url, **options)
    store.check()
    if store.manifest.num_samples == 0:
        raise UserError(f"{flag} {url} holds no images: give a set with at least one")
    return store


def split_folders(url):
    """``(url/train, url/val)`` where a local folder holds both (``val``, ``valid``, ``validation`` or ``test``)."""
    if not os.path.isdir(url) or _is_shard_set(url):
        return None
    there = _folders(url)
    held_out = next((name for name in ("val", "valid", "validation", "test") if name in there), None)
    if "train" not in there or held_out is None:
        return None
    return os.path.join(url, "train"), os.path.join(url, held_out)


def _is_shard_set(url):
    return any(os.path.exists(os.path.join(url, name)) for name in (MANIFEST_NAME, ".build"))


def _folders(url):
    return {entry.name for entry in os.scandir(url) if entry.is_dir() and not entry.name.startswith(".")}


def labels_of(store, what):
    """The label of every image, (n,) int64, by its number in the set; UserError where one has none."""
    indexes = store.concurrently(store.index, range(len(store.manifest.shards)))
    labels = np.concatenate([index.labels for index in indexes])
    num_classes = len(store.manifest.classes)
    wrong = int(((labels < 0) | (labels >= num_classes)).sum())
    if num_classes < 2:
        raise UserError(f"{store.url} has {num_classes} class: {what} needs at least 2")
    if wrong:
        raise UserError(
            f"{what} needs a class label from 0 to {num_classes - 1} on every image, but {wrong:,} of {len(labels):,} "
            f"in {store.url} have none or another: give a set built from class folders"
        )
    return labels


def check_same_classes(train, val, what):
    """Refuse two sets whose labels do not mean the same."""
    if train.manifest.classes != val.manifest.classes:
        raise UserError(
            f"{what} needs the same classes in both sets, but those of {train.url} "
            f"({len(train.manifest.classes)}) and {val.url} ({len(val.manifest.classes)}) differ: "
            "build both from trees with the same class folders"
        )


def fingerprint(store):
    """sha256 (hex) of what a store's manifest says of its content."""
    parts = [store.manifest.classes, [shard.sha256 for shard in store.manifest.shards]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FolderStore(Store):
    """A folder of class folders, read in place; labels are the places of the sorted folder names.

    Its files stand in a fixed random order, cut into blocks that take the place of shards. A block's hash is one of
    names and sizes, not of the images.
    """

    def __init__(self, path):
        from data_prep.sources import FolderSource, image_folders

        self.url = str(path)
        self._begin()
        self._source = FolderSource(path)
        folders = image_folders(self._source.scan(), self.url)
        if None not in folders:
            raise UserError(
                f"{self.url} holds {' and '.join(folders)}: give one of them, {self.url}/{next(iter(folders))}"
            )
        classes, images = folders[None].classes, folders[None].images
        numbers = {name: number for number, name in enumerate(classes)}
        images = [images[i] for i in permutation(len(images), FOLDER_ORDER)]
        self._blocks = [
            FileIndex(
                [
                    (image.name, image.file, numbers[image.class_name])
                    for image in images[start : start + BLOCK_FILES]
                ]
            )
            for start in range(0, len(images), BLOCK_FILES)
        ]
        counts = Counter(image.class_name for image in images)
        shards = tuple(_block_info(number, block) for number, block in enumerate(self._blocks))
        self.manifest = Manifest(
            classes=tuple(classes),
            class_counts=tuple(counts[name] for name in classes),
            num_samples=len(images),
            num_bytes=sum(shard.num_bytes for shard in shards),
            shards=shards,
            fixed=[],
            rejected=[{"name": name, "reason": reason} for name, reason in folders[None].skipped],
            build={},
        )

    def check(self):
        """Nothing to compare with: the files were listed a moment ago."""

    def index(self, shard):
        return self._blocks[shard]

    def read(self, shard, start, num_bytes):
        """The whole file number ``start`` of a block."""
        data = self._source.read(self._blocks[shard].files[start])
        if len(data) != num_bytes:
            name = self._blocks[shard].keys[start]
            raise UserError(
                f"{self.url}/{name} has {len(data):,} bytes and had {num_bytes:,}: it is being changed"
            )
        return data

    read_checked = read  # no hash is known


def _block_info(number, block):
    lines = [[key, size] for key, size in zip(block.keys, block.sizes, strict=True)]
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return ShardInfo(f"{number:06d}", len(block), int(sum(block.sizes)), digest, f"{number:06d}", 0, digest)


class FileIndex:
    """The files of a block as :class:`~caco_scale.data.shards.ShardIndex` has samples: file i "starts" at i."""

    def __init__(self, images):
        self.keys = [name for name, _, _ in images]
        self.files = [file for _, file, _ in images]
        self.sizes = [file.num_bytes for file in self.files]
        self.labels = np.array([label for _, _, label in images], np.int64)

    def __len__(self):
        return len(self.keys)

    def span(self, position):
        return position, self.sizes[position]

    def members(self, position):
        return [("jpg", 0, self.sizes[position])]  # its content decides how it is decoded


class Subset(Store):
    """Some images of a store, in its order. ``ids``: their numbers in the set, ascending."""

    def __init__(self, store, ids):
        assert (np.diff(ids) > 0).all(), "ids must ascend"
        self.url, self._store, self._chosen = store.url, store, {}
        first = np.concatenate([[0], np.cumsum([shard.num_samples for shard in store.manifest.shards])])
        edges = np.searchsorted(ids, first)
        self._positions = [
            ids[a:b] - start for a, b, start in zip(edges[:-1], edges[1:], first[:-1], strict=True)
        ]
        shards = tuple(
            replace(shard, num_samples=len(positions))
            for shard, positions in zip(store.manifest.shards, self._positions, strict=True)
        )
        self.manifest = replace(store.manifest, num_samples=len(ids), shards=shards)

    @property
    def remote(self):
        return self._store.remote

    @property
    def cache(self):
        return self._store.cache

    def index(self, shard):
        if shard not in self._chosen:
            self._chosen[shard] = ChosenSamples(self._store.index(shard), self._positions[shard])
        return self._chosen[shard]

    def read(self, shard, start, num_bytes):
        return self._store.read(shard, start, num_bytes)

    def read_checked(self, shard, start, num_bytes):
        return self._store.read_checked(shard, start, num_bytes)

    def take_counters(self):
        return self._store.take_counters()

    def add_counters(self, taken):
        self._store.add_counters(taken)

    def concurrently(self, function, items):
        return self._store.concurrently(function, items)

    def can_prefetch(self, shards):
        return all(self._most_of(shard) for shard in shards) and self._store.can_prefetch(shards)

    def prefetch(self, shards):
        self._store.prefetch(shards)

    def fetch(self, shard):
        if self._most_of(shard):
            self._store.fetch(shard)

    def _most_of(self, shard):
        return len(self._positions[shard]) >= PREFETCH_SHARE * self._store.manifest.shards[shard].num_samples


class ChosenSamples:
    """Some samples of a shard's index; also the sequence of their keys."""

    def __init__(self, index, positions):
        self._index, self._positions = index, positions.tolist()
        self.labels = index.labels[positions]
        self.keys = self

    def __len__(self):
        return len(self._positions)

    def __getitem__(self, position):
        return self._index.keys[self._positions[position]]

    def span(self, position):
        return self._index.span(self._positions[position])

    def members(self, position):
        return self._index.members(self._positions[position])
