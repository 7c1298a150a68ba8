"""A listing: which files a set is of, compactly, in a file of arrays that all processes of a node map into memory.

It is made once. A run keeps it in its directory: what has changed on the disk since is an error that names it. Where no
run keeps it, it is in memory that loader workers share.

The file is one of safetensors: ``ends`` (n,) of the names, ``sizes`` (n,) in bytes, ``labels`` (n,) (-1: none),
``hashes`` (blocks, 32), ``names`` (all of them joined, UTF-8), and in the metadata what the set is. Files stand in a
fixed random order, cut into blocks of 1,000 that take the place of shards.
"""

import hashlib
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from caco_scale.atomic import atomic_file
from caco_scale.data.order import permutation
from caco_scale.data.own_files import nameless_file
from caco_scale.data.shard_index import ShardIndex, smallest
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import Manifest
from caco_scale.errors import UserError, one_line

FOLDER_ORDER = 79  # sets the order of a set's files apart from other orders
BLOCK_FILES = 1000
SIZES_AT_START = (
    1_000_000  # files whose sizes are compared at the start; of more, names alone: a size when it is read
)
MOST_PICKLED = 1 << 24  # bytes of a listing
KINDS = {"ends": "<i8", "sizes": "<i8", "labels": "<i4", "hashes": "|u1", "names": "|u1"}
NAMES = {"<i8": "I64", "<i4": "I32", "|u1": "U8"}


class Rows:
    """The files of a set as they are listed: names joined, and of each the name's length, its bytes, its label.

    about: what a :class:`~caco_scale.data.shards.Manifest` says beside them: ``classes``, ``skipped``. hash_labels:
    are the labels given, and not by the names?
    """

    def __init__(
        self,
        names: bytes,
        lengths: NDArray[np.integer],
        sizes: NDArray[np.int64],
        labels: NDArray[np.integer],
        about: dict[str, Any],
        hash_labels: bool = False,
    ):
        self.names, self.lengths, self.sizes, self.labels = names, lengths, sizes, labels
        self.about, self.hash_labels = about, hash_labels
        self.order = permutation(len(sizes), FOLDER_ORDER)

    def blocks(self):
        """(the names of a block's files, each as bytes) of all blocks, in the fixed random order."""
        starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        for first in range(0, len(self.order), BLOCK_FILES):
            ids = self.order[first : first + BLOCK_FILES]
            places = zip(starts[ids].tolist(), self.lengths[ids].tolist(), strict=True)
            yield [self.names[start : start + length] for start, length in places]

    def write(self, file: IO[bytes]) -> None:
        """The listing's file."""
        n, order = len(self.order), self.order
        arrays = {
            "ends": np.cumsum(self.lengths[order], dtype="<i8"),
            "sizes": self.sizes[order].astype("<i8"),
            "labels": self.labels[order].astype("<i4"),
        }
        num_blocks = -(-n // BLOCK_FILES)
        shapes = {"ends": [n], "sizes": [n], "labels": [n], "hashes": [num_blocks, 32]}
        header: dict[str, Any] = {"__metadata__": {"listing": json.dumps(self.about)}}
        at = 0
        for name, shape in (shapes | {"names": [len(self.names)]}).items():
            end = at + int(np.prod(shape)) * np.dtype(KINDS[name]).itemsize
            header[name] = {"dtype": NAMES[KINDS[name]], "shape": shape, "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)
        hashes_at, hashes, first = file.tell(), bytearray(), 0
        file.write(bytes(32 * num_blocks))
        for names in self.blocks():
            file.write(b"".join(names))
            part = slice(first, first + len(names))
            hashes += self._hash(names, arrays["sizes"][part].tolist(), arrays["labels"][part].tolist())
            first += len(names)
        file.seek(hashes_at)
        file.write(hashes)

    def _hash(self, names, sizes, labels):
        lines = [
            [name.decode("utf-8", "surrogateescape"), size] for name, size in zip(names, sizes, strict=True)
        ]
        if self.hash_labels:
            for line, label in zip(lines, labels, strict=True):
                line.append(label)
        return hashlib.sha256(json.dumps(lines).encode()).digest()


class ListedFiles:
    """A listing that is written. ``path``: of its file; ``about``: what the set is.

    A pickle of one that is in memory holds all of it if that is little, else it finds it as long as this process lives.
    """

    def __init__(self, path: str, descriptor: int | None = None, data: bytes | None = None):
        self.path, self._descriptor, self._data = path, descriptor, data
        try:
            mapped = np.memmap(path, np.uint8, "r") if data is None else np.frombuffer(data, np.uint8)
            start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
            header = json.loads(mapped[8:start].tobytes())
            self.about = json.loads(header["__metadata__"]["listing"])
            places = {name: header[name]["data_offsets"] for name in KINDS}
            if max(end for _, end in places.values()) + start != len(mapped):
                raise ValueError(f"{len(mapped):,} bytes")
            part = lambda name: mapped[slice(*(start + at for at in places[name]))].view(KINDS[name])
            self.ends, self.sizes, self.labels, self.names = map(part, ("ends", "sizes", "labels", "names"))
            self._hashes = part("hashes").reshape(-1, 32)
            if len(self.ends) and int(self.ends[-1]) != len(self.names):
                raise ValueError("its names are cut")
        except OSError as error:
            raise UserError(f"cannot read the listing {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the listing {path} is damaged ({one_line(error)}): remove it, and the files are listed again"
            ) from None

    @classmethod
    def in_memory(cls, rows: Rows) -> "ListedFiles":
        """Without a name on a disk."""
        descriptor = nameless_file()
        try:
            with open(os.dup(descriptor), "wb") as file:
                rows.write(file)
        except OSError as error:
            raise UserError(
                f"no room for a listing of {len(rows.sizes):,} files ({error.strerror})"
            ) from None
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", descriptor)

    def __reduce__(self):
        data = self._data
        if self._descriptor is not None and os.fstat(self._descriptor).st_size <= MOST_PICKLED:
            data = Path(self.path).read_bytes()
        return ListedFiles, (self.path, None, data)

    def __del__(self):
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.sizes)

    def manifest(self) -> Manifest:
        """What the set holds, its blocks in the place of shards."""
        counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.about["classes"]))
        firsts = np.arange(0, len(self), BLOCK_FILES)
        block_bytes = np.add.reduceat(self.sizes, firsts).tolist() if len(self) else []
        infos = []
        for number, (num_bytes, digest) in enumerate(zip(block_bytes, self._hashes, strict=True)):
            name, sha256 = f"{number:06d}", digest.tobytes().hex()
            count = min(BLOCK_FILES, len(self) - number * BLOCK_FILES)
            infos.append(ShardInfo(name, count, num_bytes, sha256, name, 0, sha256))
        return Manifest(
            classes=tuple(self.about["classes"]),
            class_counts=tuple(counts.tolist()),
            num_samples=len(self),
            num_bytes=int(self.sizes.sum()),
            shards=ShardTable(infos),
            fixed=[],
            rejected=[{"name": name, "reason": reason} for name, reason in self.about["skipped"]],
            build={},
        )

    def block(self, number: int) -> ShardIndex:
        """The index of a block: file i "starts" at i; its content decides how it is decoded."""
        part = slice(number * BLOCK_FILES, min((number + 1) * BLOCK_FILES, len(self)))
        keys, ends = self._keys(part)
        count = part.stop - part.start
        nothing, sizes = np.zeros(count, np.int8), smallest(self.sizes[part])
        arrays = {
            **{"starts": smallest(np.arange(count)), "sizes": sizes, "labels": smallest(self.labels[part])},
            **{"key_ends": smallest(ends), "member_ends": smallest(np.arange(1, count + 1))},
            **{"extension": nothing, "offset": nothing, "size": sizes},
        }
        return ShardIndex(keys, ("jpg",), arrays)

    def _keys(self, part):
        """Names of some files in a row, joined, and where each ends, in characters."""
        begin = int(self.ends[part.start - 1]) if part.start else 0
        ends = self.ends[part] - begin
        joined = self.names[begin : begin + int(ends[-1])].tobytes()
        if joined.isascii():
            return joined.decode(), ends
        starts = [0, *ends.tolist()[:-1]]
        names = [
            joined[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, ends.tolist(), strict=True)
        ]
        return "".join(names), np.cumsum([len(name) for name in names])

    def name(self, number: int) -> str:
        """The name of a file by its place in the listing."""
        return self._keys(slice(number, number + 1))[0]

    def changes(self, rows: Rows, sizes: bool) -> str:
        """In words, what of the files is not as listed: what is gone, new, of another size; empty: nothing."""
        if len(rows.sizes) == len(self):
            order, at, same = rows.order, 0, True
            for names in rows.blocks():
                joined = b"".join(names)
                same = same and self.names[at : at + len(joined)].tobytes() == joined
                at += len(joined)
            if same and (not sizes or np.array_equal(self.sizes, rows.sizes[order])):
                return ""
        ends = np.cumsum(rows.lengths, dtype=np.int64)
        before, now = _hashed(self.names.data, self.ends), _hashed(rows.names, ends)
        gone, new = np.flatnonzero(~np.isin(before, now)), np.flatnonzero(~np.isin(now, before))
        found = []
        if len(gone):
            found.append((f"{self.name(int(gone[0]))} is gone", len(gone), "are gone"))
        if len(new):
            at = int(new[0])
            name = rows.names[int(ends[at] - rows.lengths[at]) : int(ends[at])].decode(
                "utf-8", "surrogateescape"
            )
            found.append((f"{name} is new", len(new), "are new"))
        if sizes:
            _, ours, theirs = np.intersect1d(before, now, return_indices=True)
            other = np.flatnonzero(self.sizes[ours] != rows.sizes[theirs])
            if len(other):
                had, has = int(self.sizes[ours[other[0]]]), int(rows.sizes[theirs[other[0]]])
                name = self.name(int(ours[other[0]]))
                found.append((f"{name} has {has:,} bytes and had {had:,}", len(other), "have another size"))
        return "; ".join(words + (f" (and {n - 1:,} more {are})" if n > 1 else "") for words, n, are in found)


def _hashed(names, ends):
    """A hash of every name (n,)."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    return np.array(
        [xxhash.xxh3_64_intdigest(names[a:b]) for a, b in zip(starts, stops, strict=True)], np.uint64
    )


class Listings:
    """Where a run keeps the listings of its sets, ``folder``; ``before``: gives where those are that hold.

    main: this process makes them and compares those that hold with the disk, once each; the others read them.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        main: bool,
        before: Callable[[], Path | None] = lambda: None,
        say: Callable[[str], object] | None = None,
    ):
        self._folder, self._main, self._before, self.say = Path(folder), main, before, say
        self._settled: set[str] = set()
        self._read: dict[Hashable, Any] = {}

    def once(self, asked: Hashable, read: Callable[[], Any]) -> Any:
        """What ``read`` gives, once for all stores that ask the same: the start of a run opens a set twice."""
        if asked not in self._read:
            self._read[asked] = read()
        return self._read[asked]

    def get(self, kind: str, place: str, read: Callable[[bool], Rows]) -> ListedFiles:
        """The listing of the set of this kind at ``place``.

        read: gives its files as they are now, with their sizes or without.
        Raises:
            UserError: something there has changed since it was listed; the place cannot be written.
        """
        name = f"{hashlib.sha256(f'{kind} {place}'.encode(errors='surrogateescape')).hexdigest()[:16]}.safetensors"
        path = self._folder / name
        if not self._main or name in self._settled:
            return ListedFiles(str(path))
        before = self._before()
        there = before / name if before else path
        if before and there.exists():
            kept = ListedFiles(str(there))
            sizes = len(kept) <= SIZES_AT_START
            if changes := kept.changes(read(sizes), sizes):
                raise UserError(f"{place} has changed since {there} listed it: {changes}; {RELIST}")
            if there != path:
                self._write(path, lambda file: file.write(there.read_bytes()))
        else:
            rows = read(True)
            self._write(path, rows.write)
        self._settled.add(name)
        return ListedFiles(str(path))

    def _write(self, path, write):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                write(file)
        except OSError as error:
            raise UserError(f"cannot write the listing {path}: {error.strerror}") from None


RELIST = "put it back as it was, or go on with what is there now, as a new data set, with --data.relist true"


def listed(listings: Listings | None, kind: str, place: str, read: Callable[[bool], Rows]) -> ListedFiles:
    """The listing of a set, kept by a run or in memory; see :meth:`Listings.get`."""
    return listings.get(kind, place, read) if listings else ListedFiles.in_memory(read(True))


def refuse_size(where: str, found: int, listed_bytes: int) -> UserError:
    """What to raise for a file whose size is not the listed one."""
    return UserError(f"{where} has {found:,} bytes and had {listed_bytes:,}: it is being changed; {RELIST}")
