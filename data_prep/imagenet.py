"""ImageNet's own archives, read in place: a tar of class tars, and the validation tar with the devkit's labels.

The devkit numbers its classes in an order of its own (ILSVRC ids). Labels of a shard set are the positions of the
sorted WNIDs, as in torchvision, whatever the devkit says.
"""

import hashlib
import io
import os
import re
import tarfile

from caco_scale.data.folders import File, Listing, hidden
from caco_scale.data.shards import Manifest
from caco_scale.data.tars import whole_tar_members
from caco_scale.errors import UserError, one_line
from data_prep.tar import TarSource

# Bytes and md5 of the official archives (image-net.org, ILSVRC 2012).
OFFICIAL = {
    147_897_477_120: "1d675b47d978889d74fa0da5fadfb00e",  # ILSVRC2012_img_train.tar
    6_744_924_160: "29b22e2961454d5413ddabcf34fc5622",  # ILSVRC2012_img_val.tar
    2_568_145: "fa75699e90414af021442c21a62c3abf",  # ILSVRC2012_devkit_t12.tar.gz
}
WNID = re.compile(r"n\d{8}")
# What a complete set has: images, classes, and the fewest and most images of a class.
EXPECTED = {"imagenet1k-train": (1_281_167, 1000, 732, 1300), "imagenet1k-val": (50_000, 1000, 50, 50)}


def check_md5(path: str, md5: str = "auto") -> bool:
    """UserError if a file's md5 is not ``md5``; "auto": the official one, for a file of an official size only.

    Returns whether anything was checked. Hashing the training archive takes minutes; "none" leaves it out.
    """
    expected = OFFICIAL.get(os.path.getsize(path)) if md5 == "auto" else md5.lower()
    if expected in (None, "none"):
        return False
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise UserError(f"{path} is damaged: its md5 is {found}, {expected} expected: download it again")
    return True


def is_tar_of_tars(path: str) -> bool:
    """Does a tar hold class tars only? Its first file decides."""
    try:
        with tarfile.open(path, "r:") as tar:
            first = next((member for member in tar if member.isreg() and not hidden(member.name)), None)
    except (tarfile.TarError, OSError, EOFError):
        return False
    return first is not None and first.name.endswith(".tar")


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file, start, num_bytes):
        self.file, self.start, self.num_bytes, self.at = file, start, num_bytes, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.num_bytes}[whence]
        return self.at

    def read(self, size=-1):
        left = max(0, self.num_bytes - self.at)
        size = left if size is None or size < 0 else min(size, left)
        data = os.pread(self.file.fileno(), size, self.start + self.at)
        self.at += len(data)
        return data

    def readinto(self, buffer):
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class TarOfTarsSource(TarSource):
    """``ILSVRC2012_img_train.tar``: one tar per class in a tar; every image is found by its offset in the whole."""

    def scan(self) -> Listing:
        listing, seen = Listing(), set()
        with open(self.path, "rb") as file:
            for outer in whole_tar_members(file, self.label):
                if hidden(outer.name) or outer.isdir():
                    continue
                class_name = os.path.basename(outer.name).removesuffix(".tar")
                if self._refused(outer) or not outer.name.endswith(".tar") or class_name in seen:
                    listing.skipped.append((outer.name, self._refused(outer) or "not a class tar of its own"))
                    continue
                seen.add(class_name)
                listing.add_folder(class_name)
                self._scan_class(file, outer, class_name, listing)
        if not listing.files:
            raise UserError(f"{self.label} has no images in {len(listing.folders)} class tars")
        return listing

    def _scan_class(self, file, outer, class_name, listing):
        part = _Part(file, outer.offset_data, outer.size)
        files = {}
        for member in whole_tar_members(part, f"{outer.name} in {self.label}"):
            name = "/".join(p for p in member.name.split("/") if p not in ("", "."))
            if self._refused(member):
                listing.skipped.append((f"{class_name}/{os.path.basename(name)}", self._refused(member)))
            elif member.isreg() and not hidden(name):
                name = f"{class_name}/{name.removeprefix(class_name + '/')}"
                files[name] = File(name, member.size, outer.offset_data + member.offset_data)
        for found in files.values():
            listing.add(found)


class FlatTarSource(TarSource):
    """A tar of images without class folders, such as ``ILSVRC2012_img_val.tar``, with a class for each.

    classes: {file name: class name}. UserError where a file has none or one is missing.
    """

    def __init__(self, path: str, label: str, classes: dict[str, str]):
        super().__init__(path, label)
        self.classes = classes

    def __getstate__(self):
        return {**super().__getstate__(), "classes": {}}  # only to scan

    def scan(self) -> Listing:
        flat = super().scan()
        listing = Listing(skipped=flat.skipped, labelled=True)
        for file in flat.files:
            name = os.path.basename(file.name)
            if name not in self.classes:
                raise UserError(f"{self.label}: {file.name} has no label in the label file")
            listing.add(file._replace(name=f"{self.classes[name]}/{name}"))
        missing = len(self.classes) - len(listing.files)
        if missing:
            raise UserError(
                f"{self.label} has {len(listing.files):,} images, the label file {missing:,} more: is it cut short?"
            )
        return listing


def read_labels(path: str, images: list[str]) -> dict[str, str]:
    """{image name: WNID} of the validation images, from the devkit or a text file.

    path: the devkit (``ILSVRC2012_devkit_t12.tar.gz``, or its unpacked folder), or a text file with a WNID per line,
    in the order of the images' names, or "name WNID" per line. images: names of the images, to pair the lines.
    """
    names = sorted(images)
    if os.path.isdir(path) or tarfile.is_tarfile(path):
        wnids = _devkit_labels(path)
    else:
        with open(path, encoding="utf-8") as file:
            lines = [line.split() for line in file if line.strip()]
        if lines and all(len(line) == 2 for line in lines):
            names, wnids = [line[0] for line in lines], [line[1] for line in lines]
        else:
            wnids = [line[0] for line in lines]
    wrong = next((wnid for wnid in wnids if not re.fullmatch(r"[\w-]+", wnid)), None)
    if wrong is not None or len(wnids) != len(names):
        raise UserError(
            f"{path} has {len(wnids):,} labels for {len(names):,} images"
            + (f", and {wrong!r} is no class name" if wrong is not None else "")
        )
    return dict(zip(names, wnids, strict=True))


def _devkit_labels(path):
    """The WNID of every validation image in order, from the devkit's ground truth and its table of classes."""
    truth = _devkit_file(path, "ILSVRC2012_validation_ground_truth.txt").decode("ascii", "replace").split()
    table = _devkit_synsets(_devkit_file(path, "meta.mat"), path)
    try:
        return [table[int(number)] for number in truth]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: the ground truth has {one_line(error)}, which is no class of meta.mat"
        ) from None


def _devkit_file(path, name):
    if os.path.isdir(path):
        for folder in (path, os.path.join(path, "data")):
            if os.path.exists(os.path.join(folder, name)):
                with open(os.path.join(folder, name), "rb") as file:
                    return file.read()
        raise UserError(f"{path} is not the devkit: it has no {name}")
    with tarfile.open(path) as tar:
        for member in tar:
            if os.path.basename(member.name) == name and (file := tar.extractfile(member)):
                return file.read()
    raise UserError(f"{path} is not the devkit: it has no {name}")


def _devkit_synsets(data, path):
    """{ILSVRC id: WNID} of the classes that are no parents of others."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            "the devkit's meta.mat needs scipy: pip install scipy, or give a text file with a WNID per line"
        ) from None
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if not int(s["num_children"])}
    except Exception as error:
        raise UserError(f"{path}: meta.mat is not the devkit's ({one_line(error)})") from None


def check_expected(manifest: Manifest, name: str, where: str) -> None:
    """UserError unless a set is the complete one that ``name`` says, by images, classes and images per class."""
    if name not in EXPECTED:
        raise UserError(f"--expect {name} is not known: give one of {', '.join(EXPECTED)}")
    num_samples, num_classes, fewest, most = EXPECTED[name]
    counts = manifest.class_counts
    odd = [c for c in manifest.classes if not WNID.fullmatch(c)]
    found = f"{where} is not {name}: it has {manifest.num_samples:,} images in {len(counts):,} classes"
    if manifest.num_samples != num_samples or len(counts) != num_classes:
        raise UserError(f"{found}, {num_samples:,} in {num_classes:,} expected")
    if (
        min(counts) != fewest
        or max(counts) != most
        or odd
        or list(manifest.classes) != sorted(manifest.classes)
    ):
        raise UserError(
            f"{found} of {min(counts):,} to {max(counts):,} images, {fewest:,} to {most:,} in sorted WNIDs expected"
        )
