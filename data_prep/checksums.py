"""Give a finished set's indexes the checksums that its version did not have; its shards stay as they are."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace

from caco_scale.atomic import write_atomically
from caco_scale.data.addresses import is_remote
from caco_scale.data.object_store import Remote
from caco_scale.data.shard_index import INDEX_SUFFIXES, ShardIndex
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.store.base import Store


def add_checksums(store: Store, place: str) -> tuple[Manifest, int]:
    """Write an index with checksums for every shard that has none, then the manifest; returns (manifest, how many).

    store: opened without a cache. place: directory or address where its manifest and indexes go, beside the shards or
    not. Every byte of those shards is read once and compared with its sha256. A new index has a name of its own and the
    manifest is replaced last, by one that differs in nothing else: a kill leaves the set as it was, and runs that read
    it meanwhile, whose indexes stay, go on. UserError: a shard that is damaged, a place that cannot be written.
    """
    write = writer(place)
    shards = list(store.manifest.shards)
    missing = [number for number, info in enumerate(shards) if not info.has_checksums]
    for number in missing:
        index = store.index(number)
        assert isinstance(index, ShardIndex), "of a whole set"
        checksums = store.learn_checksums(number)
        shards[number] = _written(shards[number], index.with_checksums(checksums), write)
    manifest = replace(store.manifest, shards=ShardTable(shards))
    if missing:
        write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest, len(missing)


def _written(info: ShardInfo, index: ShardIndex, write: Callable) -> ShardInfo:
    """The shard with another index, which is written."""
    data = index.to_bytes()
    name = info.index_name.removesuffix(INDEX_SUFFIXES[False]) + INDEX_SUFFIXES[True]
    write(name, data)
    return replace(
        info, index_name=name, index_num_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest()
    )


def writer(place: str) -> Callable:
    """``write(name, data, create=False)`` into a directory or an object store; what is there complete or not at all."""
    if is_remote(place):
        return Remote(place).write
    return lambda name, data, **_: write_atomically(os.path.join(place, name), data)
