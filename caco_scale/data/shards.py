"""The format of a shard set: ``manifest.json``, tar shards, and a small binary index beside each shard.

A shard is a plain WebDataset tar. Its index says where every sample lies: one contiguous span of bytes per
sample, tar headers included, so that a sample is one read (or one ranged request) and no tar is ever scanned
in training. The manifest names the shards with counts, sizes and hashes, and is written last: a directory
with one is complete.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from caco_scale.errors import UserError, one_line

MANIFEST_NAME = "manifest.json"
FORMAT = "caco_scale shard set"
VERSION = 1
INDEX_MAGIC = b"CACOIDX1"
MAX_PATTERN_SHARDS = 1_000_000
MAX_LABEL = 1_000_000  # a manifest counts the images of every class up to the highest label
SHA256 = r"[0-9a-f]{64}"
BLOCK = 512  # bytes of a tar block


def plain_name(name: str) -> str:
    """``name`` if it is a plain file name: no folder, no ``..``, no shell, nothing hidden; else UserError."""
    bad = not isinstance(name, str) or not name or name.startswith((".", "-"))
    if bad or any(c in '/\\|:{}*?<>"`$&;' or ord(c) < 32 for c in name):
        raise UserError(f"unsafe shard name {str(name)!r} in the manifest: build the shard set again")
    return name


def expand_braces(pattern: str) -> tuple[str, list[str]]:
    """A WebDataset brace pattern, ``s3://bucket/set/{000..012}.tar``: (its folder, the shards' plain names).

    One pair of braces in the file name: a range of numbers or a list with commas. UserError for anything else.
    """
    folder, _, name = pattern.rpartition("/")
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", name)
    if not match or "{" in folder or "}" in folder:
        raise UserError(
            f"{pattern} is not a pattern like s3://bucket/train-{{000..012}}.tar: one pair of braces, in the name"
        )
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[2])
    if numbers:
        first, last = numbers.groups()
        if not int(first) <= int(last) < int(first) + MAX_PATTERN_SHARDS:
            raise UserError(
                f"{pattern}: {first}..{last} is not a range of 1 to {MAX_PATTERN_SHARDS:,} shards"
            )
        inner = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        inner = match[2].split(",")
    names = [plain_name(match[1] + part + match[3]) for part in inner]
    if len(set(names)) != len(names):
        raise UserError(f"{pattern} names a shard twice")
    return folder or ".", names


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its tar and its index, with sizes in bytes and sha256 in hex."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_name: str
    index_num_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A shard set: classes in label order, counts, shards, and which images were fixed or rejected, why."""

    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_samples: int
    num_bytes: int
    shards: tuple[ShardInfo, ...]
    fixed: list[dict]
    rejected: list[dict]
    build: dict

    def to_json(self) -> str:
        """The text of ``manifest.json``; equal manifests give equal text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check a manifest. UserError: not JSON, unknown version, unsafe names, wrong sums."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{MANIFEST_NAME} is not JSON ({one_line(error)}): build the shard set again"
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(
                f"{MANIFEST_NAME} is not that of a {FORMAT}: build it with `python -m data_prep build`"
            )
        if data.get("version") != VERSION:
            raise UserError(
                f"{MANIFEST_NAME} has version {data.get('version')}, this program reads version {VERSION}: "
                "update the program or build the shard set again"
            )
        try:
            values = {field.name: data[field.name] for field in fields(cls)}
            values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
            values["classes"], values["class_counts"] = (
                tuple(values["classes"]),
                tuple(values["class_counts"]),
            )
            manifest = cls(**values)
            consistent = manifest._consistent()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{MANIFEST_NAME} is damaged ({error!r}): build the shard set again") from None
        if not consistent:
            raise UserError(f"{MANIFEST_NAME} is damaged (its sums disagree): build the shard set again")
        return manifest

    def _consistent(self):
        numbers = [self.num_samples, self.num_bytes, *self.class_counts]
        for shard in self.shards:
            plain_name(shard.name), plain_name(shard.index_name)
            # The cache makes them the names of files.
            for sha256 in (shard.sha256, shard.index_sha256):
                if not re.fullmatch(SHA256, sha256):
                    raise TypeError(f"{sha256!r} of {shard.name} is not a sha256")
            numbers += [shard.num_samples, shard.num_bytes, shard.index_num_bytes]
        wrong = [number for number in numbers if type(number) is not int or number < 0]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is not a number of samples or bytes")
        return (
            sum(shard.num_samples for shard in self.shards) == self.num_samples
            and sum(shard.num_bytes for shard in self.shards) == self.num_bytes
            and len(self.classes) == len(self.class_counts)
        )


def _smallest(values):
    """An array in the narrowest little-endian integer type that holds it."""
    values = np.asarray(values, np.int64)
    for dtype in ("|i1", "<i2", "<i4"):
        limits = np.iinfo(dtype)
        if not values.size or (limits.min <= values.min() and values.max() <= limits.max):
            return values.astype(dtype)
    return values.astype("<i8")


class _Keys(Sequence):
    """Sample keys kept as one string and offsets: a list of str at a tenth of the memory."""

    def __init__(self, joined, ends):
        self.joined, self.ends = joined, ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, position):
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        position = range(len(self))[position]
        start = int(self.ends[position - 1]) if position else 0
        return self.joined[start : int(self.ends[position])]

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


class ShardIndex:
    """Where the samples of one shard lie.

    keys: sequence of str (n); starts, sizes: int64 (n,), one span of bytes of the tar per sample, headers
    included; labels: int64 (n,), the integer in the sample's ``.cls``, -1 if it has none; ``members(i)``: the
    files of sample i as (extension, offset in the span, size in bytes).
    """

    # Arrays in file order; the member arrays are flat, member_ends[i] ends the members of sample i.
    _ARRAYS = ("starts", "sizes", "labels", "key_ends", "member_ends", "extension", "offset", "size")

    def __init__(self, keys: str, extensions: Sequence[str], arrays: Mapping[str, NDArray]):
        self._joined, self._extensions, self._arrays = keys, tuple(extensions), arrays
        self.keys = _Keys(keys, arrays["key_ends"])

    @classmethod
    def from_samples(cls, samples: Sequence[Sequence[Any]]) -> "ShardIndex":
        """Build from a list of (key, start, size, label, [(extension, offset in the span, size)])."""
        members = [m for sample in samples for m in sample[4]]
        extensions = sorted({m[0] for m in members})
        values = {
            "starts": [s[1] for s in samples],
            "sizes": [s[2] for s in samples],
            "labels": [s[3] for s in samples],
            "key_ends": np.cumsum([len(s[0]) for s in samples]),
            "member_ends": np.cumsum([len(s[4]) for s in samples]),
            "extension": [extensions.index(m[0]) for m in members],
            "offset": [m[1] for m in members],
            "size": [m[2] for m in members],
        }
        arrays = {name: _smallest(values[name]) for name in cls._ARRAYS}
        return cls("".join(s[0] for s in samples), extensions, arrays)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def starts(self) -> NDArray[np.int64]:
        return self._arrays["starts"].astype(np.int64)

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self._arrays["sizes"].astype(np.int64)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._arrays["labels"].astype(np.int64)

    def span(self, position: int) -> tuple[int, int]:
        """(start, size in bytes) of one sample, plain ints."""
        return int(self._arrays["starts"][position]), int(self._arrays["sizes"][position])

    def members(self, position: int) -> list[tuple[str, int, int]]:
        """The files of one sample: list of (extension, offset in the span, size in bytes)."""
        ends = self._arrays["member_ends"]
        start = int(ends[position - 1]) if position else 0
        extension, offset, size = (self._arrays[name] for name in ("extension", "offset", "size"))
        rows = range(start, int(ends[position]))
        return [(self._extensions[extension[m]], int(offset[m]), int(size[m])) for m in rows]

    def to_bytes(self) -> bytes:
        """Magic, length of a JSON header, header, keys, arrays: the same bytes on every machine."""
        keys = self._joined.encode("utf-8", "surrogateescape")
        arrays = [[name, self._arrays[name].dtype.str, len(self._arrays[name])] for name in self._ARRAYS]
        header = json.dumps(
            {"keys": len(keys), "extensions": list(self._extensions), "arrays": arrays}
        ).encode()
        body = b"".join(self._arrays[name].tobytes() for name in self._ARRAYS)
        return INDEX_MAGIC + len(header).to_bytes(8, "little") + header + keys + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardIndex":
        """Inverse of ``to_bytes``; UserError for anything else."""
        try:
            if data[:8] != INDEX_MAGIC:
                raise ValueError("it does not begin as one")
            at = 16 + int.from_bytes(data[8:16], "little")
            header = json.loads(data[16:at])
            keys = data[at : at + header["keys"]].decode("utf-8", "surrogateescape")
            at += header["keys"]
            arrays = {}
            for name, dtype, length in header["arrays"]:
                dtype = np.dtype(dtype)
                if name not in cls._ARRAYS or dtype.kind != "i":
                    raise ValueError(f"unknown array {name} {dtype}")
                arrays[name] = np.frombuffer(data, dtype, length, at)
                at += dtype.itemsize * length
            if at != len(data) or len(arrays) != len(cls._ARRAYS):
                raise ValueError(f"{len(data)} bytes, {at} expected")
            return cls(keys, header["extensions"], arrays)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"not a shard index ({one_line(error)}): build the shard set again") from None


class Samples(Protocol):
    """What is read of an index: :class:`ShardIndex`, or some of its samples."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    def span(self, position: int) -> tuple[int, int]: ...
    def members(self, position: int) -> list[tuple[str, int, int]]: ...


def read_sample(index: Samples, position: int, span: bytes) -> dict[str, Any]:
    """A sample as webdataset's dict, ``{"__key__": str, "jpg": bytes, ...}``, from its span of bytes."""
    sample = {"__key__": index.keys[position]}
    for extension, offset, size in index.members(position):
        assert offset + size <= len(span), "the span is shorter than the index says"
        sample[extension] = bytes(span[offset : offset + size])
    return sample
