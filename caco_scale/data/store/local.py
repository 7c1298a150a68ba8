"""A shard set in a directory."""

import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator

from caco_scale.data.addresses import check_address, is_remote, local_path
from caco_scale.data.counters import Counters
from caco_scale.data.object_store import WrongBytes
from caco_scale.data.shard_index import checksum
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.small_files import MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, open_regular, read_small
from caco_scale.data.store.base import MAX_OPEN_FILES, Store
from caco_scale.errors import UserError

HASH_BYTES = 16 << 20


class LocalStore(Store):
    """A shard set in a local (or mounted) directory.

    ``path`` is the directory, ``shards_at`` where the shards are: there, for an indexed foreign set perhaps elsewhere.
    UserError where there is no manifest, or none of ours.
    """

    pickled = ("url", "path", "manifest", "shards_at")

    def __init__(self, url: str, counters: Counters | None = None):
        self.url, self.path = url, local_path(url)
        self._begin(counters or Counters())
        path = os.path.join(self.path, MANIFEST_NAME)
        try:
            data = read_small(path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise UserError(f"{url} has no {MANIFEST_NAME}: {self._what_instead()}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        self.manifest = Manifest.from_bytes(data, url)
        self.shards_at = _shards_at(self.manifest, self.path)

    def _what_instead(self):
        if os.path.isdir(os.path.join(self.path, ".build")):
            return "its build has not finished, run the same `python -m data_prep build` again"
        return "it is not a shard set, give the directory that `python -m data_prep build` has made"

    def _begin(self, counters):
        super()._begin(counters)
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()

    def _check_files(self, share):
        """Compare the size of every shard and index of the share with the manifest."""
        for shard in itertools.islice(self.manifest.shards, share[0], None, share[1]):
            sizes = (shard.name, shard.num_bytes), (shard.index_name, shard.index_num_bytes)
            for name, expected in sizes:
                path = os.path.join(self.shards_at if name == shard.name else self.path, name)
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    raise UserError(f"shard file {path}: {error.strerror}: {self.repair_hint}") from None
                if size != expected:
                    raise UserError(
                        f"shard file {path} has {size:,} bytes, {expected:,} expected: {self.repair_hint}"
                    )

    def _index_bytes(self, info):
        path = os.path.join(self.path, info.index_name)
        try:
            return read_small(path, MAX_INDEX_BYTES)
        except OSError as error:
            raise UserError(f"shard index {path}: {error.strerror}: {self.repair_hint}") from None

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        """``num_bytes`` of a shard from ``start``. UserError when the shard is missing or too short."""
        try:
            # The reference keeps the file open even if another thread drops it from the table meanwhile.
            file = self._file(shard)
            data = os.pread(file.fileno(), num_bytes, start)
        except OSError as error:
            raise UserError(f"shard file {self._path(shard)}: {error.strerror}: {self.repair_hint}") from None
        if len(data) != num_bytes:
            path = self._path(shard)
            size, expected = os.stat(path).st_size, self.manifest.shards[shard].num_bytes
            raise UserError(
                f"shard file {path} has {size:,} bytes, {expected:,} expected: {self.repair_hint}"
            )
        if recorded is not None and checksum(data) != recorded:
            raise WrongBytes(
                f"shard file {self._path(shard)} is damaged from byte {start:,} to {start + num_bytes:,}"
            )
        return data

    def _path(self, shard):
        return os.path.join(self.shards_at, self.manifest.shards[shard].name)

    def _file(self, shard):
        file = self._files.pop(shard, None) or open_regular(self._path(shard))
        self._files[shard] = file
        while len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def chunks(self, shard: int) -> Iterator[bytes]:
        """The bytes of a whole shard."""
        info = self.manifest.shards[shard]
        for start in range(0, info.num_bytes, HASH_BYTES):
            yield self.read(shard, start, min(HASH_BYTES, info.num_bytes - start))


def _shards_at(manifest, path):
    """Where the shards of an indexed foreign set are; ``path`` for all others."""
    at = manifest.build.get("shards_at", path)
    if not isinstance(at, str) or "|" in at:
        raise UserError(f"{path}: {MANIFEST_NAME} says that the shards are at {at!r}: index the set again")
    if is_remote(at):
        check_address(at)
        return at
    return os.path.join(path, at)
