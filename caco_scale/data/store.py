"""Where shards are read from: one small interface, local directories now, object stores behind it later.

A store has ``url``, ``manifest``, ``check()``, ``index(shard)`` and ``read(shard, start, num_bytes)``. It is
picklable and keeps no state that a fork or a forkserver child could share wrongly.
"""

import hashlib
import io
import os
import re
from collections import OrderedDict

from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardIndex
from caco_scale.errors import UserError

MAX_OPEN_FILES = 128
MAX_INDEXES = 1024  # about 50 kB each for shards of 1,000 samples
OBJECT_STORES = ("s3", "gs", "az", "http", "https")
BUILD_AGAIN = "delete it and run the same `python -m data_prep build` again: it builds only what is missing"


def open_store(url):
    """The store that ``url`` names: a directory with a ``manifest.json``. UserError for anything else."""
    url = os.fspath(url)
    if not url:
        raise UserError(
            "data.shards is empty: give the directory of a shard set (`python -m data_prep build`)"
        )
    if url.startswith("pipe:") or any(c in url for c in "|{}"):
        raise UserError(
            f"data.shards {url!r} is a shell pipe or a brace pattern: "
            f"give the directory that holds {MANIFEST_NAME}"
        )
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if scheme and scheme[1] in OBJECT_STORES:
        raise UserError(
            f"data.shards {url}: {scheme[1]}:// is not supported in this version: give a local directory"
        )
    if scheme and scheme[1] != "file":
        raise UserError(f"data.shards {url}: unknown kind of address {scheme[1]}://: give a local directory")
    return LocalStore(url)


class LocalStore:
    """A shard set in a local (or mounted) directory.

    ``url`` is the address as given, ``manifest`` its parsed manifest. Missing directory or manifest:
    UserError.
    """

    def __init__(self, url):
        self.url = url
        self.path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
        self._forget()
        path = os.path.join(self.path, MANIFEST_NAME)
        if not os.path.isdir(self.path):
            what = "is a file, not a directory" if os.path.exists(self.path) else "does not exist"
            raise UserError(
                f"shard directory {url} {what}: make one with `python -m data_prep build SRC {url}`"
            )
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            raise UserError(f"{url} has no {MANIFEST_NAME}: {self._what_instead()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        try:
            self.manifest = Manifest.from_json(text)
        except UserError as error:
            raise UserError(f"{url}: {error}") from None

    def _what_instead(self):
        if os.path.isdir(os.path.join(self.path, ".build")):
            return "its build has not finished, run the same `python -m data_prep build` again"
        splits = sorted(
            e.name for e in os.scandir(self.path) if os.path.exists(os.path.join(e.path, MANIFEST_NAME))
        )
        if splits:
            return f"did you mean {' or '.join(os.path.join(self.url, s) for s in splits[:3])}?"
        return f"it is not a shard set, make one with `python -m data_prep build SRC {self.url}`"

    def _forget(self):
        self._files, self._indexes = OrderedDict(), OrderedDict()

    def __getstate__(self):
        return {"url": self.url, "path": self.path, "manifest": self.manifest}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def check(self):
        """Compare the size of every shard and index with the manifest. UserError names the first wrong."""
        for shard in self.manifest.shards:
            sizes = (shard.name, shard.num_bytes), (shard.index_name, shard.index_num_bytes)
            for name, expected in sizes:
                path = os.path.join(self.path, name)
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    raise UserError(f"shard file {path}: {error.strerror}: {BUILD_AGAIN}") from None
                if size != expected:
                    raise UserError(
                        f"shard file {path} has {size:,} bytes, {expected:,} expected: {BUILD_AGAIN}"
                    )

    def index(self, shard):
        """The index of shard number ``shard``, checked against the manifest's sha256 and kept."""
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        info = self.manifest.shards[shard]
        path = os.path.join(self.path, info.index_name)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"shard index {path}: {error.strerror}: {BUILD_AGAIN}") from None
        if hashlib.sha256(data).hexdigest() != info.index_sha256:
            raise UserError(
                f"shard index {path} ({len(data):,} bytes) differs from the manifest: {BUILD_AGAIN}"
            )
        index = ShardIndex.from_bytes(data)
        if len(index) != info.num_samples:
            raise UserError(
                f"shard index {path} has {len(index)} samples, {info.num_samples} expected: {BUILD_AGAIN}"
            )
        self._indexes[shard] = index
        while len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def read(self, shard, start, num_bytes):
        """``num_bytes`` of a shard from ``start``. UserError when the shard is missing or too short."""
        path = os.path.join(self.path, self.manifest.shards[shard].name)
        try:
            # The reference keeps the file open even if another thread drops it from the table meanwhile.
            file = self._file(shard, path)
            data = os.pread(file.fileno(), num_bytes, start)
        except OSError as error:
            raise UserError(f"shard file {path}: {error.strerror}: {BUILD_AGAIN}") from None
        if len(data) != num_bytes:
            size, expected = os.stat(path).st_size, self.manifest.shards[shard].num_bytes
            raise UserError(f"shard file {path} has {size:,} bytes, {expected:,} expected: {BUILD_AGAIN}")
        return data

    def _file(self, shard, path):
        file = self._files.pop(shard, None) or io.FileIO(path)
        self._files[shard] = file
        while len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file
