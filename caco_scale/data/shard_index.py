"""The index of a shard: where every sample lies in the tar, and a checksum of its bytes.

A sample is one contiguous span of bytes, tar headers included. Whoever reads a span compares it with the checksum that
was made with the shard: no read believes bytes that are not the recorded ones. Indexes of version 1 have none.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from caco_scale.data.index_checks import check_arrays, read_header
from caco_scale.errors import UserError, one_line

INDEX_MAGICS = (b"CACOIDX1", b"CACOIDX2")  # without and with checksums
INDEX_SUFFIXES = (".idx", ".idx2")  # of their names
HASH_BYTES = 4 << 20  # read at once to be hashed


def smallest(values):
    """An array in the narrowest little-endian integer type that holds it."""
    values = np.asarray(values, np.int64)
    for dtype in ("|i1", "<i2", "<i4"):
        limits = np.iinfo(dtype)
        if not values.size or (limits.min <= values.min() and values.max() <= limits.max):
            return values.astype(dtype)
    return values.astype("<i8")


class JoinedStrings(Sequence):
    """Strings kept as one string and where each ends: a list of str at a tenth of the memory."""

    def __init__(self, joined, ends):
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, strings):
        """Those of a list."""
        return cls("".join(strings), smallest(np.cumsum([len(one) for one in strings])))

    def __len__(self):
        return len(self.ends)

    def __iter__(self):
        start = 0
        for end in self.ends.tolist():
            yield self.joined[start:end]
            start = end

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
    files of sample i as (extension, offset in the span, size in bytes). checksums: uint64 (n,), :func:`checksum` of
    every span, or None in an index that has none.
    """

    # Arrays in file order; the member arrays are flat, member_ends[i] ends the members of sample i.
    _ARRAYS = ("starts", "sizes", "labels", "key_ends", "member_ends", "extension", "offset", "size")

    def __init__(
        self,
        keys: str,
        extensions: Sequence[str],
        arrays: Mapping[str, NDArray],
        checksums: NDArray[np.uint64] | None = None,
    ):
        self._joined, self._extensions, self._arrays = keys, tuple(extensions), arrays
        self.keys, self.checksums = JoinedStrings(keys, arrays["key_ends"]), checksums

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sequence[Any]], checksums: ArrayLike | None = None
    ) -> "ShardIndex":
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
        arrays = {name: smallest(values[name]) for name in cls._ARRAYS}
        index = cls("".join(s[0] for s in samples), extensions, arrays)
        return index if checksums is None else index.with_checksums(checksums)

    def with_checksums(self, checksums: ArrayLike | None) -> "ShardIndex":
        """The same index with these checksums (n,), or with none."""
        array = None if checksums is None else np.array(checksums, "<u8")
        assert array is None or array.shape == (len(self),), "one for every sample"
        return ShardIndex(self._joined, self._extensions, self._arrays, array)

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

    def checksum(self, position: int) -> int | None:
        """What :func:`checksum` gives for the span of one sample, where that is recorded."""
        return None if self.checksums is None else int(self.checksums[position])

    def members(self, position: int) -> list[tuple[str, int, int]]:
        """The files of one sample: list of (extension, offset in the span, size in bytes)."""
        ends, columns = self._arrays["member_ends"], ("extension", "offset", "size")
        start, stop = ends[position - 1] if position else 0, ends[position]
        extensions, offsets, sizes = (self._arrays[name][start:stop].tolist() for name in columns)
        return list(zip([self._extensions[number] for number in extensions], offsets, sizes, strict=True))

    def to_bytes(self) -> bytes:
        """Magic, length of a JSON header, header, keys, arrays, checksums: the same bytes on every machine."""
        keys = self._joined.encode("utf-8", "surrogateescape")
        arrays = [[name, self._arrays[name].dtype.str, len(self._arrays[name])] for name in self._ARRAYS]
        header = json.dumps(
            {"keys": len(keys), "extensions": list(self._extensions), "arrays": arrays}
        ).encode()
        body = b"".join(self._arrays[name].tobytes() for name in self._ARRAYS)
        if self.checksums is not None:
            body += self.checksums.tobytes()
        return (
            INDEX_MAGICS[self.checksums is not None]
            + len(header).to_bytes(8, "little")
            + header
            + keys
            + body
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardIndex":
        """Inverse of ``to_bytes``; UserError for anything else."""
        try:
            if data[:8] not in INDEX_MAGICS:
                raise ValueError("it does not begin as one")
            header, at = read_header(data)
            keys = data[at : at + header["keys"]].decode("utf-8", "surrogateescape")
            at += header["keys"]
            arrays = {}
            for name, dtype, length in header["arrays"]:
                dtype = np.dtype(dtype)
                if name not in cls._ARRAYS or dtype.kind != "i":
                    raise ValueError(f"unknown array {name} {dtype}")
                arrays[name] = np.frombuffer(data, dtype, length, at)
                at += dtype.itemsize * length
            checksums = None
            if data[:8] == INDEX_MAGICS[True]:
                checksums = np.frombuffer(data, "<u8", len(arrays["starts"]), at)
                at += checksums.nbytes
            if at != len(data) or len(arrays) != len(cls._ARRAYS):
                raise ValueError(f"{len(data)} bytes, {at} expected")
            check_arrays(keys, header["extensions"], arrays)
            return cls(keys, header["extensions"], arrays, checksums)
        except (ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"not a shard index ({one_line(error)}): build the shard set again") from None


def checksum(span: bytes) -> int:
    """XXH3 (64 bits) of a sample's bytes: against damage, not against forgery. It costs a 200th of their decoding."""
    return xxhash.xxh3_64_intdigest(span)


def hash_spans(
    starts: NDArray[np.int64], sizes: NDArray[np.int64], chunks: Iterable[bytes]
) -> tuple[str, int, NDArray[np.uint64]]:
    """One pass over the bytes of a shard -> (its sha256, its size in bytes, the checksum of every span (n,)).

    UserError for spans that overlap or do not lie in the shard.
    """
    stops = starts + sizes
    if (starts[1:] < stops[:-1]).any() or (starts < 0).any() or (sizes < 0).any():
        raise UserError("not a shard index (its samples overlap): build the shard set again")
    first, last, sums = starts.tolist(), stops.tolist(), np.zeros(len(starts), "<u8")
    digest, span = hashlib.sha256(), xxhash.xxh3_64()
    position = num_bytes = 0
    for chunk in chunks:
        digest.update(chunk)
        view, begin, num_bytes = memoryview(chunk), num_bytes, num_bytes + len(chunk)
        while position < len(first) and first[position] < num_bytes:
            span.update(view[max(first[position] - begin, 0) : last[position] - begin])
            if last[position] > num_bytes:
                break
            sums[position] = span.intdigest()
            span.reset()
            position += 1
    if position < len(first):
        raise UserError(f"the shard ends after {num_bytes:,} bytes, within its sample {position}")
    return digest.hexdigest(), num_bytes, sums


class Samples(Protocol):
    """What is read of an index: :class:`ShardIndex`, or some of its samples."""

    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def checksums(self) -> NDArray[np.uint64] | None: ...
    def span(self, position: int) -> tuple[int, int]: ...
    def checksum(self, position: int) -> int | None: ...
    def members(self, position: int) -> list[tuple[str, int, int]]: ...


def read_sample(index: Samples, position: int, span: bytes) -> dict[str, Any]:
    """A sample as webdataset's dict, ``{"__key__": str, "jpg": bytes, ...}``, from its span of bytes."""
    sample = {"__key__": index.keys[position]}
    for extension, offset, size in index.members(position):
        assert offset + size <= len(span), "the span is shorter than the index says"
        sample[extension] = bytes(span[offset : offset + size])
    return sample
