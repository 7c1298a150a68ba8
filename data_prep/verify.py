"""Does a shard set agree with its manifest? Fast: sizes, indexes, counts. Full: every byte and image."""

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from caco_scale.data.addresses import is_remote, local_path
from caco_scale.data.object_store import Remote, Unreachable
from caco_scale.data.pixels import CorruptSample
from caco_scale.data.samples import NoImage, image_in, problem_of
from caco_scale.data.shard_index import read_sample
from caco_scale.data.shards import MANIFEST_NAME, Manifest
from caco_scale.data.splits import SPLITS, split_rank
from caco_scale.data.store import open_store
from caco_scale.data.store.base import Store
from caco_scale.data.store.local import LocalStore
from caco_scale.data.tars import index_tar
from caco_scale.errors import UserError
from data_prep.destination import FULL_DISK, free_space
from data_prep.imagenet import check_expected


def verify(
    path: str | os.PathLike, full: bool = False, workers: int | None = None, expect: str | None = None
) -> list[tuple[str, Manifest]]:
    """Check the shard set in ``path``, or the sets of its splits; returns [(directory or address, manifest)].

    path: a directory or the address of a folder of an object store. ``full`` also reads every shard: sha256 of
    tar and index, the index against the tar, every image decoded. ``expect``: a name of
    :data:`~data_prep.imagenet.EXPECTED` that a set must be. Raises UserError naming the first bad shard and how
    many are bad.
    """
    results = [(place, _verify_set(place, full, workers)) for place in _sets(path)]
    for place, manifest in results:
        if expect:
            check_expected(manifest, expect, place)
    return results


def _sets(path):
    path = os.fspath(path)
    if is_remote(path) or "{" in path:
        if "{" not in path and Remote(path).size(MANIFEST_NAME) is None:
            splits = [f"{path.rstrip('/')}/{split}" for split in SPLITS]
            return [split for split in splits if Remote(split).size(MANIFEST_NAME) is not None] or [path]
        return [path]
    path = local_path(path)
    if os.path.exists(os.path.join(path, MANIFEST_NAME)) or not os.path.isdir(path):
        return [path]
    sets = [os.path.join(path, name) for name in sorted(os.listdir(path), key=split_rank)]
    return [place for place in sets if os.path.exists(os.path.join(place, MANIFEST_NAME))] or [path]


def bad_shards(
    store: Store, full: bool, workers: int | None = None
) -> tuple[list[tuple[int, str]], NDArray[np.int64]]:
    """([(shard number, what is wrong with it)], images per class in the others)."""
    manifest = store.manifest
    numbers = range(len(manifest.shards))
    workers = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(numbers)) if full else 1
    check = partial(check_shard, store, full=full)
    if workers <= 1:
        results = list(map(check, numbers))
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_prep.verify"])
        with ProcessPoolExecutor(workers, context) as pool:
            results = list(pool.map(check, numbers))
    bad = [(number, problem) for number, (problem, _) in enumerate(results) if problem]
    return bad, sum((labels for _, labels in results), np.zeros(len(manifest.classes), np.int64))


def _verify_set(path, full, workers):
    store = open_store(path, "none")
    manifest = store.manifest
    bad, counts = bad_shards(store, full, workers)
    if bad:
        number, problem = bad[0]
        raise UserError(
            f"{path}: {len(bad)} of {len(manifest.shards)} shards are bad, first {manifest.shards[number].name} "
            f"({problem}): {store.repair_hint}"
        )
    if counts.tolist() != list(manifest.class_counts):
        raise UserError(
            f"{path}: the labels in the shards are not counted as in {MANIFEST_NAME}: build the set again"
        )
    return manifest


def check_shard(store: Store, number: int, full: bool = False) -> tuple[str | None, NDArray[np.int64]]:
    """(what is wrong with a shard or None, its images per class).

    UserError where that cannot be told: the store is out of reach, the temporary directory is full.
    """
    info = store.manifest.shards[number]
    none = np.zeros(len(store.manifest.classes), np.int64)
    try:
        problem = _wrong_size(store, info)
        if problem:
            return problem, none
        index = store.index(number)
        problem = (_wrong_bytes(store, number, index) if full else None) or problem_of(index, len(none))
        if problem:
            return problem, none
        return None, np.bincount(index.labels[index.labels >= 0], minlength=len(none))
    except Unreachable:
        raise
    except OSError as error:
        if error.errno in FULL_DISK or error.filename is None:  # not of a shard: they are only read
            folder = tempfile.gettempdir()
            raise UserError(
                f"no space for {folder} to check {info.name}: {error.strerror}; {free_space(folder)}, "
                f"{info.num_bytes / 1e6:,.1f} MB are needed: free some, or set TMPDIR"
            ) from None
        return f"{os.path.basename(error.filename)}: {error.strerror}", none
    except ValueError as error:
        return str(error), none


def _wrong_size(store, info):
    for name, expected in ((info.name, info.num_bytes), (info.index_name, info.index_num_bytes)):
        if isinstance(store, LocalStore):
            folder = store.shards_at if name == info.name else store.path
            size = os.path.getsize(os.path.join(folder, name))
        else:
            own_index = store.local_index and name == info.index_name
            size = expected if own_index else store.remote.size(name)
        if size is None:
            return f"{name}: no such object"
        if size != expected:
            return f"{name} has {size:,} bytes, {expected:,} expected"
    return None


def _wrong_bytes(store, number, index):
    """What is wrong with the content of a shard, read once into a temporary file."""
    info, digest = store.manifest.shards[number], hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        for chunk in store.chunks(number):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != info.sha256:
            return "its sha256 differs"
        file.seek(0)
        found = index_tar(file, info.name, store.manifest.build.get("image"))
        if found.with_checksums(None).to_bytes() != index.with_checksums(None).to_bytes():
            return "its index is not that of the tar"
        for position in range(len(index)):
            start, size = index.span(position)
            _decode(read_sample(index, position, os.pread(file.fileno(), size, start)), store.pixels)
    if index.checksums is not None and (index.checksums != found.checksums).any():
        return "the checksums of its index are not those of the tar"
    return None


def _decode(sample, pixels):
    from caco_scale.data.decode import decode  # not above: it needs torch, the fast check does not

    try:
        decode(image_in(sample), pixels)
    except (NoImage, CorruptSample) as error:
        raise CorruptSample(f"sample {sample['__key__']}: {error}") from None


def histogram(manifest: Manifest, width: int = 40) -> Iterator[str]:
    """Lines of a text histogram of the classes."""
    most = max(*manifest.class_counts, 1)
    name_width = min(max(map(len, manifest.classes), default=0), 30)
    for name, count in zip(manifest.classes, manifest.class_counts, strict=True):
        yield f"{name[:30]:<{name_width}} {count:>9,} {'#' * round(width * count / most)}"
