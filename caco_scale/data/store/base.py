"""What every store of images is and does; where its bytes come from is the kinds' business.

The loader asks a store for ``manifest``, ``index(shard)`` and ``read(shard, start, num_bytes)``; what is called a shard
need not be a tar.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caco_scale.data.cache import ShardCache
from caco_scale.data.counters import Counters
from caco_scale.data.object_store import Remote
from caco_scale.data.order import first_ids, locate
from caco_scale.data.shards import MANIFEST_NAME, Manifest, Samples, ShardIndex, ShardInfo
from caco_scale.errors import UserError, quoted

MAX_OPEN_FILES = 128
MAX_INDEXES = 1024  # about 50 kB each for shards of 1,000 samples


class DamagedShard(UserError):
    """The bytes of a shard are not the manifest's, however often they are fetched."""


class Store:
    """Images in numbered shards: ``url`` as it was given, ``manifest``, ``counters`` of this process.

    Picklable: what belongs to a process (open files, threads, counts) stays there. ``cache`` is that of whole shards on
    this node, if there is one.
    """

    url: str
    manifest: Manifest
    counters: Counters
    cache: ShardCache | None = None
    pickled: ClassVar[tuple[str, ...]] = ("url", "manifest")  # the attributes that a pickle takes along

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.pickled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(Counters())

    def _begin(self, counters):
        """Make what belongs to this process."""
        self.counters = counters
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._index_locks: dict[int, threading.Lock] = {}
        self._intact: set[int] = set()

    def _parse_manifest(self, text):
        try:
            self.manifest = Manifest.from_json(text)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from None

    @property
    def remote(self) -> Remote | None:
        """The object store that the shards are in, if they are in one."""
        return None

    @property
    def repair_hint(self) -> str:
        """What to do about damaged shards or images, in words."""
        if self.manifest.build.get("foreign"):
            return (
                "there is no source to build tars of others from: put the good tar back, or remove "
                f"{self.url.rstrip('/')}/{MANIFEST_NAME} and run `{self._index_command()}`"
            )
        return f"`python -m data_prep repair SRC {quoted(self.url)}` builds what is bad again from its source"

    def _index_command(self):
        """What has made this indexed foreign set, and would again."""
        build = self.manifest.build
        tars = build.get("shards_at", self.url)
        words = [f"{tars.rstrip('/')}/{build['pattern']}" if "pattern" in build else tars]
        words += ["--to", self.url] if "shards_at" in build else []
        words += ["--image", build["image"]] if "image" in build else []
        return f"python -m data_prep index {' '.join(map(quoted, words))}"

    @property
    def verify_hint(self) -> str:
        """How to find out what is damaged, in words."""
        return f"check the set with `python -m data_prep verify --full {quoted(self.url)}`"

    def check(self) -> None:
        """Compare what is there with the manifest. UserError names the first wrong, and a set without an image."""
        if self.manifest.num_samples == 0:
            raise UserError(f"{self.url} holds no images: give a set with at least one")
        self._check_files()

    def _check_files(self):
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 (hex) of what the manifest says of the content."""
        parts = [self.manifest.classes, [shard.sha256 for shard in self.manifest.shards]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # Where samples are

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        return first_ids([shard.num_samples for shard in self.manifest.shards])

    def locate(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples by their numbers in the set: ids (n,) -> (shard (n,), position in the shard (n,))."""
        return locate(self._first, ids)

    def names(self, ids: ArrayLike) -> list[str]:
        """``shard/key`` of samples by their numbers in the set."""
        places = zip(*(part.tolist() for part in self.locate(ids)), strict=True)
        return [f"{self.manifest.shards[s].name}/{self.index(s).keys[p]}" for s, p in places]

    def index(self, shard: int) -> Samples:
        """The index of shard number ``shard``, checked against the manifest and kept."""
        index = self._indexes.get(shard)
        if index is None:
            with self._index_locks.setdefault(shard, threading.Lock()):  # several threads want it at once
                index = self._indexes.get(shard) or self._load_index(shard)
        return index

    def _load_index(self, shard):
        info = self.manifest.shards[shard]
        name = f"{self.url.rstrip('/')}/{info.index_name}"
        data = self._index_bytes(info)
        if hashlib.sha256(data).hexdigest() != info.index_sha256:
            raise UserError(
                f"shard index {name} ({len(data):,} bytes) differs from the manifest: {self.repair_hint}"
            )
        index = ShardIndex.from_bytes(data)
        if len(index) != info.num_samples:
            raise UserError(
                f"shard index {name} has {len(index)} samples, {info.num_samples} expected: {self.repair_hint}"
            )
        self._indexes[shard] = index
        while len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
        return index

    def _index_bytes(self, info: ShardInfo) -> bytes:
        raise NotImplementedError

    # Reading

    def read(self, shard: int, start: int, num_bytes: int) -> bytes:
        """``num_bytes`` of a shard from ``start``. UserError where they cannot be had."""
        raise NotImplementedError

    def chunks(self, shard: int) -> Iterator[bytes]:
        """The bytes of a whole shard."""
        raise NotImplementedError

    def read_checked(self, shard: int, start: int, num_bytes: int) -> bytes:
        """As ``read``, after the whole shard's sha256 was found to be the manifest's (once per shard).

        UserError if it is another: then nothing in the shard can be believed.
        """
        if shard not in self._intact:
            info = self.manifest.shards[shard]
            digest, got = hashlib.sha256(), 0
            for chunk in self.chunks(shard):
                digest.update(chunk)
                got += len(chunk)
            if digest.hexdigest() != info.sha256:
                raise UserError(
                    f"shard {info.name} of {self.url} is damaged: its {got:,} bytes have another sha256 than "
                    f"the manifest's {info.sha256[:12]}: {self.repair_hint}"
                )
            self._intact.add(shard)
        return self.read(shard, start, num_bytes)

    # For local files there is nothing to gain below.

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """``map(function, items)``; where reading waits for a network, several calls at once."""
        return map(function, items)

    def can_prefetch(self, shards: Iterable[int]) -> bool:
        """Is there a cache that holds these shards at once?"""
        return False

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch whole shards in the background."""

    def fetch(self, shard: int) -> None:
        """Have a whole shard at hand before going on, if there is a place to keep it."""
