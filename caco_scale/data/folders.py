"""Folders of images: the files below a folder, and what they mean (splits, classes, images), decided once.

What is listed may be a folder on a disk or any other listing of names with "/" between them (a tar, see data_prep).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from caco_scale.data import scan
from caco_scale.data.splits import Splits, find_splits, some_names, split_kind, split_rank
from caco_scale.errors import UserError, did_you_mean, quoted

# Kinds of files that PIL or simplejpeg read, the usual ones first; what a file IS is decided by its content.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm", "jp2"),
    *("pgm", "jpe", "jfif", "pbm", "pnm"),
    "npy",
)
MOST_DEPTH = 6  # folders that lie deeper decide nothing


class File(NamedTuple):
    """A file: name with "/" between folders, size (0: not known), where its bytes begin."""

    name: str
    num_bytes: int
    offset: int = 0


@dataclass
class Listing:
    """Everything a source holds: files, names of folders, and (name, reason) of what is passed over.

    labelled: the top folders are classes for certain, whatever their names: a file of labels says so.
    """

    files: list[File] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    labelled: bool = False

    def add(self, file: File) -> None:
        """Add a file and the folders that it lies in."""
        self.files.append(file)
        self.add_folder(file.name.rpartition("/")[0])

    def add_folder(self, name: str) -> None:
        """Add a folder and those that it lies in."""
        parts = name.split("/") if name else []
        for depth in range(1, min(len(parts), MOST_DEPTH) + 1):
            self.folders.add("/".join(parts[:depth]))

    def top_folders(self) -> list[str]:
        """The folders that lie in no other: splits in their usual order, then by name."""
        return sorted((name for name in self.folders if "/" not in name), key=split_rank)

    def splits(self) -> Splits:
        """What its folders are: splits (train, val, ...), classes, or nobody can tell."""
        if self.labelled:
            return Splits()
        with_images = {file.name.rpartition("/")[0] for file in self.files if is_image(file.name)}
        return find_splits(with_images, self.folders)


def hidden(name: str) -> bool:
    """Is it a file of the system beside the images, such as ``.DS_Store`` and ``__MACOSX/._cat.jpg``?"""
    return any(map(scan.hidden, name.split("/")))


def is_image(name: str) -> bool:
    """Does the name end as an image's?"""
    return os.path.splitext(name)[1].lower().removeprefix(".") in IMAGE_EXTENSIONS


def is_picture(name: str) -> bool:
    """Does the name end as an image's, and not as an array's (``.npy``)?"""
    return is_image(name) and not name.lower().endswith(".npy")


def without_arrays(listing: Listing) -> Listing:
    """Among pictures a ``.npy`` is something else (a mask, features): it is passed over, and an image where all are."""
    arrays = {file.name for file in listing.files if is_image(file.name) and not is_picture(file.name)}
    if arrays and any(is_picture(file.name) for file in listing.files):
        listing.files = [file for file in listing.files if file.name not in arrays]
        listing.skipped += [(name, "an array among pictures") for name in sorted(arrays)]
    return listing


class FolderSource:
    """A directory tree. Symbolic links are followed, once (:mod:`caco_scale.data.scan`): the tree is the user's own."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)

    def scan(self) -> Listing:
        """Everything below the folder; hidden files are passed over without a word."""
        found = scan.scan(self.path, lambda _: True, most_skipped=sys.maxsize)
        listing = Listing([File(name, size) for name, size in found], skipped=found.skipped)
        for name in found.folders:
            listing.add_folder(name)
        return without_arrays(listing)

    def read(self, file: File) -> bytes:
        """The bytes of a file."""
        try:
            with open(os.path.join(self.path, file.name), "rb") as stream:
                return stream.read()
        except OSError as error:
            raise UserError(f"cannot read {os.path.join(self.path, file.name)}: {error.strerror}") from None


class Image(NamedTuple):
    """One image: its class ("" for none), its name ``class/file`` in the folder, and where its bytes are."""

    class_name: str
    name: str
    file: File


@dataclass
class ImageFolder:
    """One split: classes in label order, images by (class, name), (name, reason) of what is no image.

    left_out: folders and images beside the splits, which are in none of them.
    """

    classes: tuple[str, ...]
    images: list[Image]
    skipped: list[tuple[str, str]]
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """Words for the images and the classes: "30 images in 3 classes (ant, bee, cat)"."""
        return in_words(len(self.images), self.classes)

    def fingerprint(self) -> str:
        """sha256 (hex) of the listing: classes, names, sizes, skipped files; equal for a tree and its tar."""
        lines = [json.dumps([image.name, image.file.num_bytes]) for image in self.images]
        return hashlib.sha256(json.dumps([self.classes, self.skipped, lines]).encode()).hexdigest()


def in_words(num_images: int, classes: Sequence[str]) -> str:
    """Words for images and their classes, with the first names: "30 images in 3 classes (ant, bee, cat)"."""
    found = f"{num_images:,} image{'s' * (num_images != 1)}"
    if not classes:
        return f"{found} without classes"
    return f"{found} in {len(classes):,} class{'es' * (len(classes) != 1)} ({some_names(classes, 8)})"


def all_images(listing: Listing) -> ImageFolder:
    """Every image of a listing, wherever it lies; its class is the top folder, and none outside of one."""
    images = [Image(f.name.partition("/")[0] if "/" in f.name else "", f.name, f) for f in listing.files]
    images = sorted(image for image in images if is_image(image.name))
    found = {image.class_name for image in images if image.class_name}
    classes = tuple(sorted(found | set(listing.top_folders()) if listing.labelled else found))
    skipped = [(file.name, "its name is not an image's") for file in listing.files if not is_image(file.name)]
    return ImageFolder(classes, images, sorted(listing.skipped + skipped))


def image_folders(
    listing: Listing,
    where: str,
    split: str | None = None,
    skip_empty_classes: bool = False,
    split_folders: bool | None = None,
) -> dict[str | None, ImageFolder]:
    """The folders of class folders of a listing: ``{None: folder}``, or one per split if its folders are splits.

    ``where`` names the source in messages. With ``split`` only that one. split_folders: are there splits? None: the
    names decide, see :func:`~caco_scale.data.splits.find_splits`. The labels of every split are the classes of the
    train split (of all splits when there is none). UserError: no images, no class folders, an empty class folder
    (unless they are to be skipped), a class that train lacks, no such split, folders that may be either.
    """
    if not any(is_image(file.name) for file in listing.files):
        folders = f"{len(listing.top_folders())} folders"
        parquet = any(file.name.endswith(".parquet") for file in listing.files)
        hint = ": pass --format parquet to read its parquet files" if parquet else ""
        raise UserError(f"{where} has no images ({len(listing.files)} other files, {folders}){hint}")
    if listing.labelled:
        return {None: all_images(listing)}
    splits = _asked_splits(listing, where, split, split_folders)
    if not splits.names:
        if split is not None or split_folders:
            what = f"split {split!r}" if split is not None else "folders with the names of splits"
            raise UserError(
                f"{where} has no {what}: its top folders are classes ({some_names(listing.top_folders())})"
            )
        return {None: _folder(listing, where, "", (), skip_empty_classes)}
    if split is not None and split not in splits.names:
        raise UserError(
            f"{where} has no split {split!r}{did_you_mean(split, splits.names)}, only {some_names(splits.names)}"
        )
    prefixes = {name: f"{splits.prefix}{name}/" for name in splits.names}
    folders: dict[str | None, ImageFolder] = {
        name: _folder(listing, where, prefixes[name], tuple(prefixes.values()), skip_empty_classes)
        for name in splits.names
        if split in (None, name) or split_kind(name) == "train"
    }
    train = [name for name in splits.names if split_kind(name) == "train"]
    labels = _union(folders[name] for name in train or folders)
    loose = _outside(listing, tuple(f"{splits.prefix}{name}/" for name in (*splits.names, *splits.others)))
    for name, folder in folders.items():
        unknown = sorted(set(folder.classes) - set(labels))
        if unknown:
            raise UserError(
                f"{where}: {name} has {len(unknown)} classes that {train[0]} lacks ({some_names(unknown)}): "
                f"labels come from {train[0]}, so rename or remove them"
            )
        folder.classes, folder.left_out = labels, (*splits.others, *loose)
    return folders if split is None else {None: folders[split]}


def _asked_splits(listing, where, split, split_folders):
    """The splits of a listing by its names and what the user said of them."""
    if split_folders is False:
        return Splits()
    splits = listing.splits()
    if split_folders and split in splits.others:
        names = tuple(sorted((*splits.names, split), key=split_rank))
        splits = replace(splits, names=names, others=tuple(n for n in splits.others if n != split))
    if splits.doubt and not (splits.names and (split_folders or split in splits.names)):
        alone = (
            ""
            if splits.names
            else f", or give one folder of it, {quoted(os.path.join(where, splits.inside))}"
        )
        raise UserError(
            f"{where} holds {splits.doubt}, which may be splits or classes: pass "
            + ("--split-folders for a set of each split, " if splits.names else "")
            + f"--no-split-folders to take all of it as one set{alone}"
        )
    return splits


def _outside(listing, prefixes):
    """The names of images that lie in none of the folders."""
    return [file.name for file in listing.files if is_image(file.name) and not file.name.startswith(prefixes)]


def _union(folders: Iterable[ImageFolder]):
    return tuple(sorted({name for folder in folders for name in folder.classes}))


def _folder(listing, where, prefix, splits, skip_empty_classes):
    """The image folder below ``prefix`` ("" or "train/", one of ``splits``): its folders are the classes."""
    where = os.path.join(where, prefix.rstrip("/")) if prefix else where
    depth = prefix.count("/")
    classes = {n[len(prefix) :] for n in listing.folders if n.startswith(prefix) and n.count("/") == depth}
    # What lies in no split at all, such as "../x" in a tar, is recorded with every split.
    skipped = [s for s in listing.skipped if s[0].startswith(prefix) or not s[0].startswith(splits)]
    images, loose = [], 0
    for file in listing.files:
        if not file.name.startswith(prefix):
            continue
        name = file.name[len(prefix) :]
        class_name, slash, _ = name.partition("/")
        if slash and is_image(name):
            images.append(Image(class_name, name, file))
        elif is_image(name):
            loose += 1
            skipped.append((name, "not in a class folder"))
        elif slash:
            skipped.append((name, "its name is not an image's"))
    if not images:
        raise no_image_folder(where, loose, len(classes))
    empty = sorted(classes - {image.class_name for image in images})
    if empty and not skip_empty_classes:
        raise UserError(
            f"{where}: {len(empty)} of {len(classes)} class folders have no images ({some_names(empty)}): "
            "remove them or pass --skip-empty-classes"
        )
    classes = tuple(sorted({image.class_name for image in images}))
    images.sort(key=lambda image: (image.class_name, image.name))
    return ImageFolder(classes, images, sorted(skipped))


def no_image_folder(where: str, loose: int, num_folders: int) -> UserError:
    """What to raise for a folder whose class folders have no images, while so many lie directly in it."""
    found = f"its {loose} images lie directly in it" if loose else f"no images in {num_folders} class folders"
    hint = " (pre-training needs no classes: data.shards takes the folder itself)" if loose else ""
    return UserError(
        f"{where} is not an image folder ({found}): give a folder of class folders of images{hint}"
    )
