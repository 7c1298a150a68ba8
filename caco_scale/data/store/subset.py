"""Some images of a store as a store of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.object_store import Remote
from caco_scale.data.shard_index import Samples
from caco_scale.data.shard_table import ShardTable
from caco_scale.data.store.base import Store

PREFETCH_SHARE = 0.5  # of a shard's images that must be wanted before fetching all of it pays


class Subset(Store):
    """Some images of a store, in its order. ``ids``: their numbers in the set, ascending, (n,)."""

    pickled = ("url", "manifest", "_store", "_positions")

    def __init__(self, store: Store, ids: NDArray[np.int64]):
        assert (np.diff(ids) > 0).all(), "ids must ascend"
        shards, positions = store.locate(ids)
        infos = store.manifest.shards
        self._positions = np.split(positions, np.searchsorted(shards, np.arange(1, len(infos))))
        kept = zip(infos, self._positions, strict=True)
        shards = ShardTable(replace(info, num_samples=len(here)) for info, here in kept)
        self.url, self.pixels, self._store = store.url, store.pixels, store
        self.manifest = replace(store.manifest, num_samples=len(ids), shards=shards)
        self._begin(None)

    def _begin(self, counters):
        super()._begin(self._store.counters)
        self.cache = self._store.cache
        self._chosen: dict[int, ChosenSamples] = {}

    @property
    def remote(self) -> Remote | None:
        return self._store.remote

    def index(self, shard: int) -> "ChosenSamples":
        if shard not in self._chosen:
            self._chosen[shard] = self._choose(shard)
        return self._chosen[shard]

    def _choose(self, shard):
        return ChosenSamples(self._store.index(shard), self._positions[shard])

    def read_sample(self, shard: int, position: int) -> dict[str, Any]:
        return self._store.read_sample(shard, int(self._positions[shard][position]))

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        return self._store.read(shard, start, num_bytes, recorded)

    def learn_checksums(self, shard: int) -> NDArray[np.uint64] | None:
        return self._store.learn_checksums(shard)

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return self._store.concurrently(function, items)

    def can_prefetch(self, shards: Iterable[int]) -> bool:
        return all(self._most_of(shard) for shard in shards) and self._store.can_prefetch(shards)

    def prefetch(self, shards: Iterable[int]) -> None:
        self._store.prefetch(shards)

    def fetch(self, shard: int) -> None:
        if self._most_of(shard):
            self._store.fetch(shard)

    def _most_of(self, shard):
        return len(self._positions[shard]) >= PREFETCH_SHARE * self._store.manifest.shards[shard].num_samples


class Relabelled(Subset):
    """All images of a store, their labels as places in ``classes``, among which are all of the store's own."""

    pickled = (*Subset.pickled, "_labels")

    def __init__(self, store: Store, classes: tuple[str, ...]):
        super().__init__(store, np.arange(store.manifest.num_samples))
        places = {name: place for place, name in enumerate(classes)}
        counts = dict(zip(store.manifest.classes, store.manifest.class_counts, strict=True))
        self._labels = np.array(
            [*(places[name] for name in store.manifest.classes), -1]
        )  # the last: of no class
        class_counts = tuple(counts.get(name, 0) for name in classes)
        self.manifest = replace(self.manifest, classes=classes, class_counts=class_counts)

    def _choose(self, shard):
        chosen = super()._choose(shard)
        chosen.labels = self._labels[np.minimum(chosen.labels, len(self._labels) - 1)]
        return chosen


class ChosenSamples(Sequence[str]):
    """Some samples of a shard's index; also the sequence of their keys."""

    def __init__(self, index: Samples, positions: NDArray[np.int64]):
        self._index, self._positions = index, positions.tolist()
        self.labels = index.labels[positions]
        self.checksums = None if index.checksums is None else index.checksums[positions]
        self.keys = self

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position):
        return self._index.keys[self._positions[position]]

    def span(self, position: int) -> tuple[int, int]:
        """(start, size in bytes) of one sample."""
        return self._index.span(self._positions[position])

    def checksum(self, position: int) -> int | None:
        """What is recorded of the bytes of one sample."""
        return self._index.checksum(self._positions[position])

    def members(self, position: int) -> list[tuple[str, int, int]]:
        """The files of one sample: list of (extension, offset in the span, size in bytes)."""
        return self._index.members(self._positions[position])
