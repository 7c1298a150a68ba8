"""Several stores as one: their shards one behind another."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.counters import Counters
from caco_scale.data.object_store import Remote
from caco_scale.data.shard_index import Samples
from caco_scale.data.shard_table import ShardTable
from caco_scale.data.shards import Manifest
from caco_scale.data.store.base import ALL, Store
from caco_scale.data.store.subset import ChosenSamples


class MixedStore(Store):
    """The images of several stores, of whatever kinds, in their order; shard ``000000`` of the second is ``1:000000``.

    Classes are those of all by their names; labels are places among them.
    """

    pickled = ("url", "manifest", "stores")

    def __init__(self, stores: Sequence[Store], counters: Counters | None = None):
        self.stores, self.pixels = list(stores), stores[0].pixels
        self.url = " + ".join(store.url for store in stores)
        manifests = [store.manifest for store in stores]
        self.manifest = _joined(manifests)
        self._begin(counters or Counters())

    def _begin(self, counters):
        super()._begin(counters)
        for store in self.stores:
            if store.counters is not counters:  # they came in a pickle
                store._begin(counters)
        self.cache = next((store.cache for store in self.stores if store.cache is not None), None)
        self._starts = [0, *accumulate(len(store.manifest.shards) for store in self.stores)]
        places = {name: place for place, name in enumerate(self.manifest.classes)}
        # The last: of no class.
        self._labels = [
            np.array([*(places[name] for name in store.manifest.classes), -1]) for store in self.stores
        ]

    def _of(self, shard):
        """(number of the store, number of the shard there)."""
        number = bisect_right(self._starts, shard) - 1
        return number, shard - self._starts[number]

    def _by_store(self, shards: Iterable[int]) -> Iterator[tuple[Store, list[int]]]:
        groups: dict[int, list[int]] = {}
        for number, shard in map(self._of, shards):
            groups.setdefault(number, []).append(shard)
        yield from ((self.stores[number], those) for number, those in groups.items())

    @property
    def remote(self) -> Remote | None:
        return next((store.remote for store in self.stores if store.remote), None)

    @property
    def repair_hint(self) -> str:
        return "; ".join(f"in {store.url}: {store.repair_hint}" for store in self.stores)

    @property
    def verify_hint(self) -> str:
        return "; ".join(store.verify_hint for store in self.stores)

    @property
    def unchecked(self) -> str:
        return "; ".join(filter(None, (store.unchecked for store in self.stores)))

    @property
    def left_out(self) -> str:
        return "; ".join(filter(None, (store.left_out for store in self.stores)))

    def check(self, share: tuple[int, int] = ALL) -> None:
        for store in self.stores:
            store.check(share)

    def _load_index(self, shard: int) -> Samples:
        number, there = self._of(shard)
        index, labels = self.stores[number].index(there), self._labels[number]
        chosen = ChosenSamples(index, np.arange(len(index.keys)))
        chosen.labels = labels[np.minimum(chosen.labels, len(labels) - 1)]
        return self._keep_index(shard, chosen)

    def read_sample(self, shard: int, position: int) -> dict[str, Any]:
        number, there = self._of(shard)
        return self.stores[number].read_sample(there, position)

    def read(self, shard: int, start: int, num_bytes: int, recorded: int | None = None) -> bytes:
        number, there = self._of(shard)
        return self.stores[number].read(there, start, num_bytes, recorded)

    def chunks(self, shard: int) -> Iterator[bytes]:
        number, there = self._of(shard)
        return self.stores[number].chunks(there)

    def learn_checksums(self, shard: int) -> NDArray[np.uint64] | None:
        number, there = self._of(shard)
        return self.stores[number].learn_checksums(there)

    def concurrently(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Several calls at once where any store waits for a network."""
        return next((s for s in self.stores if s.remote), self.stores[0]).concurrently(function, items)

    def can_prefetch(self, shards: Iterable[int]) -> bool:
        groups = [(store, those) for store, those in self._by_store(shards) if store.cache is not None]
        return bool(groups) and all(store.can_prefetch(those) for store, those in groups)

    def prefetch(self, shards: Iterable[int]) -> None:
        for store, those in self._by_store(shards):
            store.prefetch(those)

    def fetch(self, shard: int) -> None:
        number, there = self._of(shard)
        self.stores[number].fetch(there)


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    counts: dict[str, int] = {}
    for manifest in manifests:
        for name, count in zip(manifest.classes, manifest.class_counts, strict=True):
            counts[name] = counts.get(name, 0) + count
    classes = tuple(sorted(counts))
    return Manifest(
        classes=classes,
        class_counts=tuple(counts[name] for name in classes),
        num_samples=sum(manifest.num_samples for manifest in manifests),
        num_bytes=sum(manifest.num_bytes for manifest in manifests),
        shards=ShardTable(
            replace(info, name=f"{number}:{info.name}")
            for number, manifest in enumerate(manifests)
            for info in manifest.shards
        ),
        fixed=[],
        rejected=[],
        build={},
    )
