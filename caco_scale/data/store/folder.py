"""A folder of images, read in place."""

import hashlib
import json
import os
from collections import Counter

from caco_scale.data.addresses import local_path
from caco_scale.data.counters import Counters
from caco_scale.data.folders import (
    IMAGE_EXTENSIONS,
    File,
    FolderSource,
    all_images,
    image_folders,
    is_image,
)
from caco_scale.data.order import permutation
from caco_scale.data.shard_index import ShardIndex
from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardInfo
from caco_scale.data.splits import held_out
from caco_scale.data.store.base import Store
from caco_scale.errors import UserError, quoted

FOLDER_ORDER = 79  # sets the order of a folder's files apart from other orders
BLOCK_FILES = 1000


def is_shard_set(path: str | os.PathLike) -> bool:
    """Is the local directory a shard set, or becoming one?"""
    return any(os.path.exists(os.path.join(path, name)) for name in (MANIFEST_NAME, ".build"))


def split_folders(url: str) -> tuple[str, str] | None:
    """``(url/train, url/val)`` where a local folder holds both, by their usual names (``Training``, ``test``, ...)."""
    if not os.path.isdir(url) or is_shard_set(url):
        return None
    both = held_out(sorted(entry.name for entry in os.scandir(url) if entry.is_dir()))
    return (os.path.join(url, both[0]), os.path.join(url, both[1])) if both else None


class FolderStore(Store):
    """The images below a folder on a disk, with no shards built.

    Every file whose name ends as an image's is one, at any depth; hidden files are not. The folders at the top are
    the classes, labels their places by name; an image in no folder has the label -1, so that a flat folder of
    photographs has no classes. ``labelled``: only images in class folders count, and an empty one is a UserError.

    The files, sorted by class and name, stand in a fixed random order, cut into blocks of 1,000 that take the place of
    shards. A sample's key is its path below the folder. The hash of a block is one of names and sizes, not of the
    images: a picture that changes and keeps its size is not noticed.

    UserError: no images, or splits (train, val, ...), of which one must be chosen.
    """

    pickled = ("url", "manifest", "_source", "_blocks")

    def __init__(self, url: str | os.PathLike, labelled: bool = False, counters: Counters | None = None):
        self.url = str(url)
        self._begin(counters or Counters())
        self._source = FolderSource(local_path(self.url))
        folder = self._scan(labelled)
        numbers = {name: number for number, name in enumerate(folder.classes)}
        images = [folder.images[i] for i in permutation(len(folder.images), FOLDER_ORDER)]
        self._blocks = [
            _block(
                [
                    (i.name, i.file.num_bytes, numbers.get(i.class_name, -1))
                    for i in images[start:][:BLOCK_FILES]
                ]
            )
            for start in range(0, len(images), BLOCK_FILES)
        ]
        counts = Counter(image.class_name for image in images)
        shards = tuple(_block_info(number, block) for number, block in enumerate(self._blocks))
        self.manifest = Manifest(
            classes=folder.classes,
            class_counts=tuple(counts[name] for name in folder.classes),
            num_samples=len(images),
            num_bytes=sum(shard.num_bytes for shard in shards),
            shards=shards,
            fixed=[],
            rejected=[{"name": name, "reason": reason} for name, reason in folder.skipped],
            build={},
        )

    def _scan(self, labelled):
        listing = self._source.scan()
        if not any(is_image(file.name) for file in listing.files):
            raise UserError(
                f"{self.url} has no {MANIFEST_NAME}: it is not a shard set, and no folder of images either (none of "
                f"its {len(listing.files):,} files ends in {', '.join('.' + e for e in IMAGE_EXTENSIONS[:4])}, ...): "
                "give the folder that holds the images or the shards"
            )
        self._refuse_splits(listing.splits())
        if not labelled:
            return all_images(listing)
        folder = image_folders(listing, self.url, skip_empty_classes=True, split_folders=False)[None]
        if empty := sorted(set(listing.top_folders()) - set(folder.classes)):
            raise UserError(
                f"{self.url}: {len(empty)} of {len(listing.top_folders())} class folders have no images "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}): fill or remove them"
            )
        return folder

    def _refuse_splits(self, splits):
        """UserError for a folder of which only a part may be meant: validation images are never trained on unasked."""
        place = lambda name: quoted(os.path.join(self.url, splits.prefix, name))
        if splits.doubt:
            raise UserError(
                f"{self.url} holds {splits.doubt}, which may be splits or classes: give one of its folders, such as "
                f"{place(splits.names[0] if splits.names else splits.inside)}; if they are classes, rename them or run "
                f"`python -m data_prep build --no-split-folders {quoted(self.url)} SHARDS`"
            )
        if splits.names:
            there = " and ".join(splits.prefix + name for name in splits.names)
            raise UserError(f"{self.url} holds {there}: give one of them, {place(splits.names[0])}")

    @property
    def repair_hint(self) -> str:
        return f"replace these files in {self.url}, or move them away"

    @property
    def verify_hint(self) -> str:
        return f"look at the files of {self.url}"

    def _check_files(self):
        """Nothing to compare with: the files were listed a moment ago."""

    def index(self, shard: int) -> ShardIndex:
        return self._blocks[shard]

    @property
    def unchecked(self) -> str:
        return ""  # the files are the user's own: nothing of them is recorded but names and sizes

    def learn_checksums(self, shard: int) -> None:
        return None

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """The whole file number ``start`` of a block."""
        name = self._blocks[shard].keys[start]
        data = self._source.read(File(name, num_bytes))
        if len(data) != num_bytes:
            raise UserError(
                f"{self.url}/{name} has {len(data):,} bytes and had {num_bytes:,}: it is being changed"
            )
        return data


def _block(files):
    """The index of some files (name, bytes, label): file i "starts" at i; its content decides how it is decoded."""
    return ShardIndex.from_samples(
        [(name, place, size, label, [("jpg", 0, size)]) for place, (name, size, label) in enumerate(files)]
    )


def _block_info(number, block):
    lines = [[key, size] for key, size in zip(block.keys, block.sizes.tolist(), strict=True)]
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    size = int(block.sizes.sum())
    return ShardInfo(f"{number:06d}", len(block), size, digest, f"{number:06d}", 0, digest)
