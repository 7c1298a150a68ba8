"""A folder of images, read in place."""

import os
from functools import partial

import numpy as np

from caco_scale.data.addresses import local_path
from caco_scale.data.counters import Counters
from caco_scale.data.folders import IMAGE_EXTENSIONS, MOST_DEPTH, is_image, is_picture, no_image_folder
from caco_scale.data.listed_files import Listings, Rows, listed
from caco_scale.data.parquet_columns import holds_images
from caco_scale.data.scan import Scan, scan
from caco_scale.data.shards import MANIFEST_NAME
from caco_scale.data.splits import find_splits, held_out
from caco_scale.data.store.listed import ListedStore
from caco_scale.data.store.parquet import parquet_splits
from caco_scale.errors import UserError, quoted


def is_shard_set(path: str | os.PathLike) -> bool:
    """Is the local directory a shard set, or becoming one?"""
    return any(os.path.exists(os.path.join(path, name)) for name in (MANIFEST_NAME, ".build"))


def split_folders(url: str) -> tuple[str, str] | None:
    """``(url/train, url/val)`` where a local folder holds both, by their usual names (``Training``, ``test``, ...)."""
    if not os.path.isdir(url) or is_shard_set(url):
        return None
    names = parquet_splits(url)
    both = held_out(
        sorted(entry.name for entry in os.scandir(url) if entry.is_dir()) if names is None else names
    )
    return (os.path.join(url, both[0]), os.path.join(url, both[1])) if both else None


class FolderStore(ListedStore):
    """The images below a folder on a disk, with no shards built.

    Every file whose name ends as an image's is one, at any depth (an array, ``.npy``, where there are no others);
    hidden files are not. The folders at the top are the classes, labels their places by name; an image in no folder has
    the label -1, so that a flat folder of photographs has no classes. ``labelled``: only images in class folders count,
    and an empty one is a UserError.

    The files, sorted by class and name, stand in a fixed random order (:mod:`caco_scale.data.listed_files`).

    UserError: no images, or splits (train, val, ...), of which one must be chosen.
    """

    def __init__(
        self,
        url: str | os.PathLike,
        labelled: bool = False,
        counters: Counters | None = None,
        listings: Listings | None = None,
    ):
        url = str(url)
        path, kind = local_path(url), "class folders" if labelled else "folder"
        files = listed(listings, kind, path, partial(_rows, url, labelled, listings and listings.say))
        super().__init__(url, path, files, counters)

    @property
    def rgb_command(self) -> str:
        return f"python -m data_prep build --rgb {quoted(self.url)} SHARDS"


def _rows(url, labelled, say, sizes):
    """The images below a folder as they are now."""
    found = scan(local_path(url), is_picture, sizes, say)
    if not len(found.sizes):
        found = scan(local_path(url), is_image, sizes, say)  # of arrays alone
    if not len(found.sizes):
        raise UserError(
            f"{url} has no {MANIFEST_NAME}: it is not a shard set, and no folder of images either (none of "
            f"its {found.num_skipped:,} files ends in {', '.join('.' + e for e in IMAGE_EXTENSIONS[:4])}, ...): "
            "give the folder that holds the images or the shards"
        )
    _refuse_parquet(url, found)
    return rows_of(url, labelled, found)


def rows_of(url: str, labelled: bool, found: Scan) -> Rows:
    """What of a folder's files is the set; see :class:`FolderStore`."""
    _refuse_splits(url, found)
    tops = found.top_of_each()
    first, loose = (1, tops[0][1]) if labelled and tops[0][0] == "" else (0, 0)
    tops = tops[first:] if labelled else tops
    classes = sorted(name for name, count in tops if name and count)
    if labelled:
        folders = {name for name, _ in tops}
        if not classes:
            raise no_image_folder(url, loose, len(folders))
        if empty := sorted(folders - set(classes)):
            raise UserError(
                f"{url}: {len(empty)} of {len(folders)} class folders have no images "
                f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}): fill or remove them"
            )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.repeat([numbers.get(name, -1) for name, _ in tops], [count for _, count in tops])
    loose_bytes = int(found.lengths[:loose].sum(dtype=np.int64))
    return Rows(
        found.names[loose_bytes:],
        found.lengths[loose:],
        found.sizes[loose:],
        labels.astype(np.int32),
        {"classes": classes, "skipped": found.skipped},
    )


def _refuse_parquet(url, found):
    """UserError for images beside parquet files that hold images, too: nobody can tell which are meant."""
    files = [name for name, _ in found.skipped if name.endswith(".parquet")]
    if files and holds_images(os.path.join(local_path(url), files[0])):
        folder = os.path.dirname(files[0])
        alone = quoted(os.path.join(url, folder or files[0]))
        raise UserError(
            f"{url} holds {len(found.sizes):,} image files and parquet files with images ({files[0]}): give the folder "
            f"or the file of one of them, such as {alone}"
        )


def _refuse_splits(url, found):
    """UserError for a folder of which only a part may be meant: validation images are never trained on unasked."""
    cut = lambda name: "/".join(name.split("/")[:MOST_DEPTH])
    with_images = {name for name, count in found.folders.items() if count}
    splits = find_splits(with_images, {cut(name) for name in found.folders if name})
    place = lambda name: quoted(os.path.join(url, splits.prefix, name))
    if splits.doubt:
        raise UserError(
            f"{url} holds {splits.doubt}, which may be splits or classes: give one of its folders, such as "
            f"{place(splits.names[0] if splits.names else splits.inside)}; if they are classes, rename them or run "
            f"`python -m data_prep build --no-split-folders {quoted(url)} SHARDS`"
        )
    if splits.names:
        there = " and ".join(splits.prefix + name for name in splits.names)
        raise UserError(f"{url} holds {there}: give one of them, {place(splits.names[0])}")
