"""Does a shard set agree with its manifest? Fast: sizes, indexes, counts. Full: every byte and image."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from caco_scale.data.shards import MANIFEST_NAME, index_tar, read_sample
from caco_scale.data.store import LocalStore
from caco_scale.errors import UserError
from data_prep.destination import file_sha256
from data_prep.sources import SPLITS, is_image

FIX = (
    "delete the bad shards and run the same `python -m data_prep build` again: it builds only what is missing"
)


def verify(path, full=False, workers=None):
    """Check the shard set in ``path``, or the sets of its splits; returns [(directory, manifest)].

    ``full`` also reads every shard: sha256 of tar and index, the index against the tar, every image decoded.
    Raises UserError naming the first bad shard and how many are bad.
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    splits = [os.path.join(path, split) for split in SPLITS]
    sets = [path] if os.path.exists(os.path.join(path, MANIFEST_NAME)) else []
    sets = sets or [split for split in splits if os.path.exists(os.path.join(split, MANIFEST_NAME))] or [path]
    return [(directory, _verify_set(directory, full, workers)) for directory in sets]


def _verify_set(path, full, workers):
    store = LocalStore(path)
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
    bad = [
        (shard.name, problem) for shard, (problem, _) in zip(manifest.shards, results, strict=True) if problem
    ]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(numbers)} shards are bad, first {bad[0][0]} ({bad[0][1]}): {FIX}"
        )
    counts = sum((labels for _, labels in results), np.zeros(len(manifest.classes), np.int64))
    if counts.tolist() != list(manifest.class_counts):
        raise UserError(
            f"{path}: the labels in the shards are not counted as in {MANIFEST_NAME}: build the set again"
        )
    return manifest


def check_shard(store, number, full=False):
    """(what is wrong with a shard or None, its images per class)."""
    info = store.manifest.shards[number]
    none = np.zeros(len(store.manifest.classes), np.int64)
    try:
        for name, expected in ((info.name, info.num_bytes), (info.index_name, info.index_num_bytes)):
            size = os.path.getsize(os.path.join(store.path, name))
            if size != expected:
                return f"{name} has {size:,} bytes, {expected:,} expected", none
        path = os.path.join(store.path, info.name)
        if full and file_sha256(path) != info.sha256:
            return "its sha256 differs", none
        index = store.index(number)
        labels = index.labels[index.labels >= 0]
        if len(labels) and labels.max() >= len(none):
            return f"label {labels.max()} with {len(none)} classes", none
        if full and index_tar(path).to_bytes() != index.to_bytes():
            return "its index is not that of the tar", none
        if full:
            for position in range(len(index)):
                _decode(read_sample(index, position, store.read(number, *index.span(position))))
        return None, np.bincount(labels, minlength=len(none))
    except OSError as error:
        return f"{os.path.basename(error.filename)}: {error.strerror}", none
    except ValueError as error:
        return str(error), none


def _decode(sample):
    from data_prep.images import (  # not above: it needs torch, the fast check does not
        CorruptSample,
        prepare_image,
    )

    image = next((data for extension, data in sample.items() if is_image("x." + extension)), None)
    if image is None:
        raise CorruptSample(f"sample {sample['__key__']} has no image")
    try:
        prepare_image(image)
    except CorruptSample as error:
        raise CorruptSample(f"sample {sample['__key__']}: {error}") from None


def histogram(manifest, width=40):
    """Lines of a text histogram of the classes."""
    most = max(*manifest.class_counts, 1)
    name_width = min(max(map(len, manifest.classes), default=0), 30)
    for name, count in zip(manifest.classes, manifest.class_counts, strict=True):
        yield f"{name[:30]:<{name_width}} {count:>9,} {'#' * round(width * count / most)}"
