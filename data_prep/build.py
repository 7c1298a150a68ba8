"""Build a shard set: one seeded global permutation of the images, cut into shards built independently.

Slot g of the permutation is the sample with key ``{g:08d}``, in shard ``g // samples_per_shard``. A rejected
image leaves its slot empty, so that a shard depends on nothing but the listing and the seed: any number of
workers, in any order, after any number of kills, writes the same bytes.

Every finished shard has a record in ``DST/.build``; ``manifest.json`` comes last and ``.build`` is removed.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack

import numpy as np

from caco_scale.data.order import permutation
from caco_scale.data.shards import MANIFEST_NAME, Manifest, ShardInfo
from caco_scale.errors import UserError
from data_prep.destination import (
    FULL_DISK,
    STATE_DIR,
    check_apart,
    destination_errors,
    finished_manifest,
    free_space,
    locked,
    prepare_destination,
    scratch_removed,
    write_atomically,
)
from data_prep.progress import BuildProgress
from data_prep.sources import compression, image_folders, open_source

PERMUTATION = 77  # sets the order of a build apart from the orders of training


def build(src, dst, *, samples_per_shard=1000, seed=0, workers=None, split=None, skip_empty_classes=False):
    """Build the shard sets of an image folder or a tar of one; returns [(directory, manifest, was there)].

    A source of splits gives one set per split, in ``dst/<split>``. Raises UserError, and keeps finished
    shards.
    """
    src, dst = os.fspath(src), os.path.abspath(os.path.expanduser(os.fspath(dst)))
    if samples_per_shard < 1 or (workers is not None and workers < 0):
        raise UserError(
            f"--samples-per-shard {samples_per_shard} must be at least 1, --workers {workers} at least 0"
        )
    check_apart(src, dst)
    with ExitStack() as stack:
        packed = compression(src) is not None
        if packed:
            stack.enter_context(scratch_removed(dst, existed=os.path.isdir(dst)))
        stack.enter_context(destination_errors(dst))
        if packed:
            stack.enter_context(locked(dst))
        source = open_source(src, os.path.join(dst, STATE_DIR))
        folders = image_folders(source.scan(), src, split, skip_empty_classes)
        if None not in folders and os.path.exists(os.path.join(dst, MANIFEST_NAME)):
            raise UserError(
                f"{dst} holds a shard set itself, splits cannot be built in it: choose another directory"
            )
        results = []
        for name, folder in folders.items():
            target = dst if name is None else os.path.join(dst, name)
            options = {"samples_per_shard": samples_per_shard, "seed": seed, "workers": workers}
            held = packed and target == dst
            results.append((target, *build_set(source, folder, target, locked_already=held, **options)))
        if packed:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
        return results


def build_set(
    source,
    folder,
    dst,
    *,
    samples_per_shard=1000,
    seed=0,
    workers=None,
    locked_already=False,
    wait=False,
    quiet=False,
):
    """Build one shard set in ``dst`` from an ImageFolder of ``source``; returns (manifest, was there).

    workers: processes (None: one per CPU; 0 or 1: in this process). ``wait``: for another build of ``dst`` to
    end, instead of refusing.
    """
    what = {
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "num_images": len(folder.images),
        "listing": folder.fingerprint(),
    }
    with ExitStack() as stack:
        stack.enter_context(destination_errors(dst))
        manifest = finished_manifest(dst, what)
        if not manifest and not locked_already:
            stack.enter_context(locked(dst, wait))
            manifest = finished_manifest(dst, what)  # another process may have just built it
        if manifest:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
            return manifest, True
        prepare_destination(dst, what)
        jobs = _jobs(source, folder, dst, samples_per_shard, seed)
        records = _run(jobs, dst, workers, quiet)
        manifest = _manifest(records, folder, what)
        write_atomically(os.path.join(dst, MANIFEST_NAME), manifest.to_json().encode())
        if not locked_already:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
        return manifest, False


def _jobs(source, folder, dst, samples_per_shard, seed):
    # Imported here and not above: it imports torch, and a user's mistakes are told before that.
    from data_prep.shard import Job

    labels = {name: label for label, name in enumerate(folder.classes)}
    order = permutation(len(folder.images), seed, PERMUTATION)
    jobs = []
    for number, first in enumerate(range(0, len(order), samples_per_shard)):
        images = [folder.images[i] for i in order[first : first + samples_per_shard]]
        images = [(labels[image.class_name], image) for image in images]
        jobs.append(Job(number, first, images, source, dst))
    return jobs


def _run(jobs, dst, workers, quiet):
    """Build all shards, in this process or in a pool; returns their records in order."""
    workers = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(jobs))
    records = {}
    num_images = sum(len(job.images) for job in jobs)
    with BuildProgress(os.path.basename(dst), num_images, quiet) as progress:
        try:
            for job, (record, kept) in _results(jobs, workers):
                records[job.number] = record
                progress.advance(len(job.images), record["info"]["num_bytes"], kept)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise UserError(_full_disk(error, jobs, records, dst)) from None
        except BrokenProcessPool:
            raise UserError(
                f"a worker was killed, perhaps for memory ({len(records)} of {len(jobs)} shards are finished "
                f"and kept): run the same command again with fewer than --workers {workers}"
            ) from None
    return [records[number] for number in sorted(records)]


def _full_disk(error, jobs, records, dst):
    needed = sum(job.num_bytes() for job in jobs if job.number not in records)
    return (
        f"no space for {dst}: {error.strerror}; {free_space(dst)}, about {needed / 1e6:,.1f} MB more are needed; "
        f"{len(records)} of {len(jobs)} shards are finished and kept: free some and run it again"
    )


def _results(jobs, workers):
    """(job, result of build_shard) for every job, as they finish; a failure lets shards in work finish."""
    from data_prep.shard import build_shard

    if workers <= 1:
        for job in jobs:
            yield job, build_shard(job)
        return
    # forkserver: its children neither copy this process nor import torch one by one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.shard"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        futures = {pool.submit(build_shard, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker():
    """A worker leaves Ctrl-C to its parent and ends with it: after a kill nobody must write on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _manifest(records, folder, what):
    shards = tuple(ShardInfo(**record["info"]) for record in records)
    counts = np.zeros(len(folder.classes), np.int64)
    fixed = [note for record in records for note in record["fixed"]]
    lost = [note for record in records for note in record["rejected"]]
    rejected = [{"key": None, "source": name, "reason": reason} for name, reason in folder.skipped] + lost
    num_samples = sum(shard.num_samples for shard in shards)
    if not num_samples:
        last = rejected[-1]
        raise UserError(
            f"none of the {len(folder.images)} images can be used; {last['source']}: {last['reason']}"
        )
    labels = {name: label for label, name in enumerate(folder.classes)}
    lost = {note["source"] for note in lost}
    for image in folder.images:
        counts[labels[image.class_name]] += image.name not in lost
    num_bytes = sum(shard.num_bytes for shard in shards)
    return Manifest(
        folder.classes, tuple(counts.tolist()), num_samples, num_bytes, shards, fixed, rejected, what
    )
