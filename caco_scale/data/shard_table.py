"""The shards of a set: what a manifest says of each, kept in columns.

Every loader worker has this list, and a set of a billion images has 100,000 shards. In columns that is 9 MB a process,
and as Python objects ten times as much.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from caco_scale.data.shard_index import INDEX_SUFFIXES, JoinedStrings, smallest

MAX_KEPT = 1024  # shards that were asked for singly, ready for the next time
SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: its tar and its index, with sizes in bytes and sha256 in hex."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_name: str
    index_num_bytes: int
    index_sha256: str

    @property
    def has_checksums(self) -> bool:
        """Has its index a checksum for every sample?"""
        return self.index_name.endswith(INDEX_SUFFIXES[True])

    def is_index(self, data: bytes) -> bool:
        """Are these the bytes of its index?"""
        return hashlib.sha256(data).hexdigest() == self.index_sha256


class ShardTable(Sequence[ShardInfo]):
    """What a tuple of :class:`ShardInfo` (n) is, in columns. Never changed."""

    def __init__(self, infos: Iterable[ShardInfo]):
        infos = tuple(infos)
        self._names = JoinedStrings.of([info.name for info in infos])
        self._index_names = JoinedStrings.of([info.index_name for info in infos])
        numbers = [(info.num_samples, info.num_bytes, info.index_num_bytes) for info in infos]
        self._numbers = [smallest(column) for column in np.array(numbers, np.int64).reshape(-1, 3).T]
        hashes = bytes.fromhex("".join(info.sha256 + info.index_sha256 for info in infos))
        self._hashes = np.frombuffer(hashes, np.uint8).reshape(len(infos), 2, SHA256_BYTES)
        self._kept: dict[int, ShardInfo] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, position: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[ShardInfo, ...]: ...
    def __getitem__(self, position):
        if isinstance(position, slice):
            return tuple(self[i] for i in range(*position.indices(len(self))))
        info = self._kept.get(position)
        if info is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()  # whatever other threads ask for meanwhile
            info = self._kept[position] = self._info(range(len(self))[position])
        return info

    def __iter__(self) -> Iterator[ShardInfo]:
        samples, sizes, index_sizes = (column.tolist() for column in self._numbers)
        text, digits = self._hashes.tobytes().hex(), 2 * SHA256_BYTES
        hashes = (text[at : at + digits] for at in range(0, len(text), digits))  # two of each shard, in turn
        return map(ShardInfo, self._names, samples, sizes, hashes, self._index_names, index_sizes, hashes)

    def _info(self, position):
        num_samples, num_bytes, index_num_bytes = (int(column[position]) for column in self._numbers)
        sha256, index_sha256 = (part.tobytes().hex() for part in self._hashes[position])
        name, index_name = self._names[position], self._index_names[position]
        return ShardInfo(name, num_samples, num_bytes, sha256, index_name, index_num_bytes, index_sha256)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    @property
    def counts(self) -> list[int]:
        """The samples of every shard."""
        return self._numbers[0].tolist()

    @property
    def sizes(self) -> list[int]:
        """The bytes of every shard."""
        return self._numbers[1].tolist()

    @property
    def sha256s(self) -> list[str]:
        """Of every shard's tar, in hex."""
        return [info.sha256 for info in self]
