"""Where images come from: a folder or a tar, seen as a flat listing of files, and its image folders.

A source has two methods: ``scan() -> Listing`` and ``read(file) -> bytes``. It is picklable: workers read by
themselves. What a listing means (splits, classes, images) is decided once, for every kind of source, by
``image_folders``.
"""

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import shutil
from dataclasses import dataclass, field
from typing import NamedTuple

from caco_scale.data.remote import is_remote
from caco_scale.data.shards import whole_tar_members
from caco_scale.errors import UserError, did_you_mean, one_line

# torchvision's list and the other usual names of what PIL reads; what a file IS is decided by its content.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".pbm", ".pnm", ".gif", ".jp2"),
)
SPLITS = ("train", "val", "valid", "validation", "test")
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CHUNK_BYTES = 1 << 20
SCRATCH_FILES = ("source.tar", "source.json")  # a decompressed source and what it was made of


class File(NamedTuple):
    """A file of a source: name with "/" between folders, size (0: not known), where its bytes begin."""

    name: str
    num_bytes: int
    offset: int = 0


@dataclass
class Listing:
    """Everything a source holds: files, names of folders, and (name, reason) of what is passed over."""

    files: list[File] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, file):
        self.files.append(file)
        self.add_folder(file.name.rpartition("/")[0])

    def add_folder(self, name):
        parts = name.split("/") if name else []
        for depth in range(1, min(len(parts), 3) + 1):  # deeper folders decide nothing
            self.folders.add("/".join(parts[:depth]))


def hidden(name):
    """Files of the system beside the images, such as ``.DS_Store`` and ``__MACOSX/._cat.jpg``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class FolderSource:
    """A directory tree. Symbolic links are followed, as torchvision does: the tree is the user's own."""

    def __init__(self, path):
        self.path = str(path)

    def scan(self):
        listing = Listing()
        self._scan(self.path, "", listing)
        return listing

    def _scan(self, path, prefix, listing):
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if hidden(entry.name):
                        continue
                    if entry.is_dir():
                        listing.add_folder(name)
                        self._scan(entry.path, name + "/", listing)
                    elif entry.is_file():
                        listing.add(File(name, entry.stat().st_size))
                    else:
                        listing.skipped.append((name, "broken link or not a regular file"))
        except OSError as error:
            raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None

    def read(self, file):
        try:
            with open(os.path.join(self.path, file.name), "rb") as stream:
                return stream.read()
        except OSError as error:
            raise UserError(f"cannot read {os.path.join(self.path, file.name)}: {error.strerror}") from None


class TarSource:
    """An uncompressed tar, read in place: member names are only names, no path of a member is ever opened.

    ``label`` is how messages name it.
    """

    def __init__(self, path, label):
        self.path, self.label, self._file = str(path), str(label), None

    def __getstate__(self):
        return {"path": self.path, "label": self.label, "_file": None}

    def scan(self):
        files, listing = {}, Listing()
        with open(self.path, "rb") as stream:
            for member in whole_tar_members(stream, self.label):
                name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                reason = self._refused(member)
                if reason:
                    listing.skipped.append((name if "unsafe" not in reason else member.name, reason))
                elif not name or hidden(name):
                    continue
                elif member.isdir():
                    listing.add_folder(name)
                else:
                    files[name] = File(
                        name, member.size, member.offset_data
                    )  # a later member of a name counts
        if not files and not listing.folders and not listing.skipped:
            raise UserError(
                f"{self.label} is an empty tar ({os.path.getsize(self.path):,} bytes, no files in it)"
            )
        for file in files.values():
            listing.add(file)
        return without_wrapper(listing)

    @staticmethod
    def _refused(member):
        if member.name.startswith("/") or ".." in member.name.split("/") or "\\" in member.name:
            return "unsafe name in the tar (absolute, '..' or a backslash)"
        if member.issym() or member.islnk():
            return "link in the tar"
        if member.issparse() or not (member.isreg() or member.isdir()):
            return "not a regular file in the tar"
        return None

    def read(self, file):
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (kept open for the next reads)
            data = os.pread(self._file.fileno(), file.num_bytes, file.offset)
        except OSError as error:
            raise UserError(f"cannot read {self.label}: {error.strerror}") from None
        if len(data) != file.num_bytes:
            raise UserError(f"{self.label} became shorter while it was read (at {file.name})")
        return data


def without_wrapper(listing):
    """A tar is often made of one folder around everything: leave that folder out of the names."""
    tops = {name.split("/")[0] for name in listing.folders}
    names = [file.name for file in listing.files]
    if len(tops) != 1 or not names or tops & set(SPLITS) or any(name.count("/") < 2 for name in names):
        return listing
    start = len(tops.pop()) + 1
    return Listing(
        [file._replace(name=file.name[start:]) for file in listing.files],
        {name[start:] for name in listing.folders if len(name) > start},
        listing.skipped,
    )


def open_source(path, scratch, kind="auto", labels=None, md5="auto", split=None):
    """The source at ``path``: a folder of class folders, a tar of one, ImageNet's archives, or parquet files.

    scratch: a folder for what cannot be read in place (a compressed tar, parquet). kind: ``auto``, ``folder``,
    ``tar`` or ``parquet``. labels: for a tar of images without folders, where their classes are. md5: see
    :func:`~data_prep.imagenet.check_md5`. split: of a parquet directory.
    """
    from data_prep import imagenet, parquet  # not above: they import this module

    path = os.path.expanduser(os.fspath(path))
    if is_remote(path):
        raise UserError(f"the source {path} is not on this machine: give a folder or a tar on its disks")
    if kind == "parquet":
        os.makedirs(scratch, exist_ok=True)
        return parquet.ParquetSource(path, scratch, split)
    if os.path.isdir(path):
        return FolderSource(path)
    if not os.path.exists(path):
        raise UserError(f"the source {path} does not exist: give a folder of class folders, or a tar of one")
    if os.path.isfile(path):
        imagenet.check_md5(path, md5)
    decompress = compression(path)
    if labels and decompress:
        raise UserError(
            f"--labels is for an uncompressed tar of images without folders: unpack {path} to a .tar first"
        )
    if decompress:
        return TarSource(_decompressed(path, decompress, scratch), path)
    _check_tar(path, path)
    if labels:
        names = [os.path.basename(file.name) for file in TarSource(path, path).scan().files]
        return imagenet.FlatTarSource(path, path, imagenet.read_labels(labels, names))
    if imagenet.is_tar_of_tars(path):
        return imagenet.TarOfTarsSource(path, path)
    return TarSource(path, path)


def needs_scratch(path, kind="auto", **_):
    """Will ``open_source`` write into its scratch folder?"""
    return kind == "parquet" or compression(path) is not None


def compression(path):
    """The function that opens a compressed file, judged by its first bytes; None: not compressed."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise UserError(f"cannot read the source {path}: {error.strerror}") from None
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise UserError(
            f"{path} is compressed with zstd, which is not supported: decompress it first (zstd -d)"
        )
    return next((function for magic, function in COMPRESSIONS.items() if head.startswith(magic)), None)


def _check_tar(path, label):
    if not os.path.isfile(path):
        raise UserError(f"the source {label} is neither a folder nor a tar")
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise UserError(f"the source {label} is an empty file (0 bytes)")
    if any(head) and head[257:262] != b"ustar" and not head[148:156].strip(b"\0 ").isdigit():
        raise UserError(f"the source {label} is neither a folder nor a tar ({os.path.getsize(path):,} bytes)")


def _decompressed(path, decompress, scratch):
    """Decompress ``path`` to ``scratch/source.tar``; what a killed build left complete is used again."""
    target, note = (os.path.join(scratch, name) for name in SCRATCH_FILES)
    status = os.stat(path)
    origin = json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    if os.path.exists(note) and os.path.exists(target):
        with open(note, encoding="utf-8") as stream:
            if stream.read() == origin:
                return target
    try:
        with decompress(path, "rb") as packed, open(target, "wb") as unpacked:
            while chunk := packed.read(CHUNK_BYTES):
                unpacked.write(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = os.path.getsize(target)
            os.unlink(target)
            free = shutil.disk_usage(scratch).free
            raise UserError(
                f"no space for {scratch} to decompress {path}: {error.strerror}; more than {size / 1e6:,.1f} MB are "
                f"needed, {free / 1e6:,.1f} MB are free there: free some, or decompress it elsewhere"
            ) from None
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    except (EOFError, lzma.LZMAError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut short: {one_line(error)}") from None
    _check_tar(target, path)
    with open(note, "w", encoding="utf-8") as stream:
        stream.write(origin)
    return target


class Image(NamedTuple):
    """One image of an image folder: its class, its name ``class/file`` in it, and where its bytes are."""

    class_name: str
    name: str
    file: File


@dataclass
class ImageFolder:
    """One split: classes in label order, images by (class, name), (name, reason) of what is no image."""

    classes: tuple[str, ...]
    images: list[Image]
    skipped: list[tuple[str, str]]

    def fingerprint(self):
        """sha256 (hex) of the listing: classes, names, sizes, skipped files; equal for a tree and its tar."""
        lines = [json.dumps([image.name, image.file.num_bytes]) for image in self.images]
        return hashlib.sha256(json.dumps([self.classes, self.skipped, lines]).encode()).hexdigest()


def image_folders(listing, where, split=None, skip_empty_classes=False):
    """The image folders of a listing: ``{None: folder}``, or one per split if the top folders are splits.

    ``where`` names the source in messages. With ``split`` only that one. The labels of every split are the
    classes of the train split (of all splits when there is none). UserError: no images, no class folders, an
    empty class folder (unless they are to be skipped), a class that train lacks, no such split.
    """
    roots = sorted((name for name in listing.folders if "/" not in name), key=_split_rank)
    if not any(is_image(file.name) for file in listing.files):
        raise UserError(f"{where} has no images ({len(listing.files)} other files, {len(roots)} folders)")
    if not _are_splits(roots, listing):
        if split is not None:
            raise UserError(f"{where} has no split {split!r}: its top folders are classes ({_some(roots)})")
        return {None: _folder(listing, where, "", skip_empty_classes)}
    if split is not None and split not in roots:
        raise UserError(f"{where} has no split {split!r}{did_you_mean(split, roots)}, only {_some(roots)}")
    folders = {
        root: _folder(listing, where, root + "/", skip_empty_classes)
        for root in roots
        if split in (None, root) or root == "train"
    }
    labels = folders["train"].classes if "train" in folders else _union(folders.values())
    for root, folder in folders.items():
        unknown = sorted(set(folder.classes) - set(labels))
        if unknown:
            raise UserError(
                f"{where}: {root} has {len(unknown)} classes that train lacks ({_some(unknown)}): "
                "labels come from train, so rename or remove them"
            )
        folder.classes = labels
    return folders if split is None else {None: folders[split]}


def _split_rank(name):
    return (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _union(folders):
    return tuple(sorted({name for folder in folders for name in folder.classes}))


def _are_splits(roots, listing):
    return set(roots) <= set(SPLITS) and any("/" in name for name in listing.folders)


def _folder(listing, where, prefix, skip_empty_classes):
    """The image folder below ``prefix`` ("" or "train/"): its folders are the classes."""
    where = os.path.join(where, prefix.rstrip("/")) if prefix else where
    depth = prefix.count("/")
    classes = {n[len(prefix) :] for n in listing.folders if n.startswith(prefix) and n.count("/") == depth}
    # What lies in no split at all, such as "../x" in a tar, is recorded with every split.
    skipped = [s for s in listing.skipped if s[0].startswith(prefix) or s[0].split("/")[0] not in SPLITS]
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
        found = (
            f"its {loose} images lie directly in it"
            if loose
            else f"no images in {len(classes)} class folders"
        )
        raise UserError(f"{where} is not an image folder ({found}): give a folder of class folders of images")
    empty = sorted(classes - {image.class_name for image in images})
    if empty and not skip_empty_classes:
        raise UserError(
            f"{where}: {len(empty)} of {len(classes)} class folders have no images ({_some(empty)}): "
            "remove them or pass --skip-empty-classes"
        )
    classes = tuple(sorted(classes - set(empty)))
    images.sort(key=lambda image: (image.class_name, image.name))
    return ImageFolder(classes, images, sorted(skipped))


def _some(names, most=3):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
