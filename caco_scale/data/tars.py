"""Reading tars: the members of a whole one, and the index of its samples.

tarfile believes what a tar says. Here a header may be long, but not without end, and all of a tar is read or it is
refused: a cut tar is never a shorter one, and nothing lies unread behind an end mark.
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from caco_scale.data.samples import NoImage, image_of, images_of, key_and_extension, label_of, some
from caco_scale.data.shard_index import HASH_BYTES, ShardIndex, hash_spans
from caco_scale.data.shards import BLOCK, MAX_LABEL
from caco_scale.errors import UserError, one_line

# Of all headers of one member together (names, extended attributes), and of those that count for the rest of the tar.
MAX_HEADER_BYTES = 1 << 20
MAX_HEADERS = 100
MAX_FILES = 1000  # of one sample
# tarfile looks for numbers in extended headers by a pattern whose time grows with the square of their length.
LONG_NUMBER = re.compile(rb"\d{300}")
TAIL_BYTES = 1 << 20  # read at once behind the end mark
DOTS = (
    "a key ends at the first dot of the name, as in webdataset: give images of their own names with one dot"
)


class _Headers:
    """The file of a tar, as tarfile reads headers from it: not more of them for one member than a limit."""

    def __init__(self, file):
        self.file = file
        self.begin()

    def begin(self):
        """The next member begins."""
        self.num_bytes = self.num_reads = 0

    def read(self, size):
        self.num_bytes += size
        self.num_reads += 1
        if size < 0 or self.num_bytes > MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"its headers claim {self.num_bytes:,} bytes, {MAX_HEADER_BYTES:,} are allowed"
            )
        if self.num_reads > 2 * MAX_HEADERS:
            raise tarfile.ReadError(f"more than {MAX_HEADERS} headers before one file")
        data = self.file.read(size)
        if size > BLOCK and LONG_NUMBER.search(data):
            raise tarfile.ReadError("a number of more than 300 digits in an extended header")
        return data

    def tell(self):
        return self.file.tell()

    def seek(self, *place):
        return self.file.seek(*place)


def whole_tar_members(file: BinaryIO | io.RawIOBase, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an uncompressed tar; UserError (after the last) when it is cut short, damaged or not all.

    tarfile alone takes a tar that is cut at a header for a shorter one, and of several in a file reads the first.
    """
    end = count = 0
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # ty: ignore[no-matching-overload]
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > num_bytes:
                    raise EOFError(f"{member.name!r} claims {member.size:,} bytes")
                if len(tar.pax_headers) > MAX_HEADERS:
                    raise tarfile.ReadError(f"more than {MAX_HEADERS} fields for all of its files")
                yield member
                headers.begin()
                tar.members.clear()  # tarfile keeps every member it met
                end = tar.offset
                count += 1
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{name}: it is not a whole tar ({one_line(error)}, after {count:,} files)") from None
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(
            f"{name}: it is not a whole tar (cut short or damaged after {end:,} bytes, {count:,} files)"
        )
    _refuse_tail(file, name, num_bytes, count)


def _refuse_tail(file, name, num_bytes, count):
    """UserError unless all behind the end mark is empty: neither we nor webdataset would read it."""
    while data := file.read(TAIL_BYTES):
        if data.count(0) != len(data):
            at = file.tell() - len(data.lstrip(b"\0"))
            raise UserError(
                f"{name} goes on for {num_bytes - at:,} bytes behind its end mark, after {count:,} files: of tars "
                "joined by cat only the first would be read (as in webdataset), and a damaged tar may look so; give "
                "each tar as a file of its own, or join them with tar --concatenate"
            )


@dataclass
class Notes:
    """What an index leaves out or cannot tell: the number of each kind, and the first of it."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, number: int = 1) -> None:
        """``kind``: in words that follow a number."""
        self.counts[kind] += number
        self.first.setdefault(kind, example)

    def lines(self) -> list[str]:
        """One for each kind."""
        return [f"{self.counts[kind]:,} {kind} (first {self.first[kind]})" for kind in sorted(self.counts)]


def index_tar(
    path_or_fileobj: str | os.PathLike | BinaryIO,
    name: str | None = None,
    image: str | None = None,
    notes: Notes | None = None,
) -> ShardIndex:
    """Index a tar by the rules of :mod:`~caco_scale.data.samples`: a sample has an image, and is whole in one place.

    Args:
        path_or_fileobj: a path or a seekable binary file.
        name: of the tar in messages.
        image: the extension of the files that are images, where several of a sample may be; the others are left out.
        notes: what is left out is added there.

    Raises:
        UserError: a tar that is cut short or damaged, a link in it, a file name that occurs twice in a sample, a
            sample whose files do not follow one another, or that has several images of which none is plainly the one
            to read.
    """
    if isinstance(path_or_fileobj, str | os.PathLike):
        with open(path_or_fileobj, "rb") as file:
            return index_tar(file, name or os.fspath(path_or_fileobj), image, notes)
    return _index_file(path_or_fileobj, name or "the tar", image, Notes() if notes is None else notes)


def _index_file(file, name, image, notes):
    samples, with_image, without = [], Counter(), {}
    for key, members in _groups(whole_tar_members(file, name), name, notes):
        try:
            chosen = image_of(members if image is None else members.keys() & {image})
        except NoImage as error:
            if image is None and images_of(members):
                raise UserError(
                    f"{name}: sample {key!r} has {error}: name it with --image {images_of(members)[0]}; {DOTS}"
                ) from None
            without[key] = True
            notes.add(
                "files of no sample with an image", f"{name}: {key}.{next(iter(members))}", len(members)
            )
            continue
        with_image[key] += 1
        others = [extension for extension in images_of(members) if extension != chosen]
        if others:
            notes.add(f"samples with several images, of which .{chosen} is read", f"{name}: {key}")
        if image:
            members = {extension: members[extension] for extension in members if extension not in others}
        samples.append(_sample(file, name, key, members, notes))
    if parts := [key for key in without if key in with_image]:
        raise UserError(
            f"{name}: the files of {len(parts):,} samples do not follow one another ({some(parts)}), and only files "
            "in a row are one sample, as in webdataset: unpack it, and write it again with tar --sort=name"
        )
    if repeated := [key for key, number in with_image.items() if number > 1]:
        notes.add("keys that come several times, as a sample each", f"{name}: {repeated[0]}", len(repeated))
    index = ShardIndex.from_samples(samples)
    file.seek(0)
    chunks = iter(lambda: file.read(HASH_BYTES), b"")
    return index.with_checksums(hash_spans(index.starts, index.sizes, chunks)[2])


def _groups(members, name, notes):
    """The files of a tar, those in a row that share a key together: (key, {extension: member})."""
    key, group = "", {}
    for member in members:
        if not (member.isreg() or member.isdir()):
            raise UserError(
                f"{name}: {member.name!r} is a link or a device: nothing is read from where it points, write the tar "
                "with the files themselves (tar --hard-dereference --dereference)"
            )
        if not member.isreg():
            continue
        parts = key_and_extension(member.name)
        if not parts:
            notes.add("files that are no sample's by their names", f"{name}: {member.name}")
            continue
        if member.issparse():
            raise UserError(f"{name}: {member.name} is stored as a sparse file: write the tar without -S")
        if group and parts[0] != key:
            yield key, group
            group = {}
        key = parts[0]
        if parts[1] in group:
            raise UserError(f"{name}: two files {member.name!r} in one sample")
        if len(group) == MAX_FILES:
            raise UserError(f"{name}: sample {key!r} has more than {MAX_FILES:,} files: {DOTS}")
        group[parts[1]] = member
    if group:
        yield key, group


def _sample(file, name, key, members, notes):
    """A sample as :meth:`ShardIndex.from_samples` takes it. ``members``: {extension: member}, in the tar's order."""
    first, last = (list(members.values())[i] for i in (0, -1))
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    places = [(extension, m.offset_data - first.offset, m.size) for extension, m in members.items()]
    label, where = -1, label_of(members)
    if where:
        member = members[where]
        file.seek(member.offset_data)
        label = _label(file.read(min(member.size, 32)), f"{name}: {member.name!r}")
        if label < 0:
            notes.add(
                "samples whose label is no number from 0, and which so have none", f"{name}: {member.name}"
            )
    return key, first.offset, end - first.offset, label, places


def _label(data, where):
    try:
        label = int(data)
    except ValueError:
        return -1
    if label > MAX_LABEL:
        raise UserError(
            f"{where} has the label {label:,}, more than {MAX_LABEL:,}: number the classes from 0"
        )
    return max(label, -1)
