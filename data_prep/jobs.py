"""The work of a build: one job per shard, done in this process or in a pool, and the manifest that comes of them."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caco_scale.data.folders import ImageFolder
from caco_scale.data.object_store import Remote
from caco_scale.data.order import permutation
from caco_scale.data.pixels import Pixels
from caco_scale.data.shard_table import ShardInfo, ShardTable
from caco_scale.data.shards import Manifest
from caco_scale.errors import UserError
from data_prep.destination import FULL_DISK, free_space
from data_prep.progress import BuildProgress
from data_prep.tar import Source

if TYPE_CHECKING:
    from data_prep.shard import Job

PERMUTATION = 77  # sets the order of a build apart from the orders of training
MAX_NOTES = 1_000_000  # of each kind in a manifest


@dataclass(frozen=True)
class Settings:
    """What a build is told besides its images.

    samples_per_shard: images; seed: of the order in which they fill the shards; short_side: pixels that larger images
    are made small to (0: none); workers: processes (None: one per CPU; 0 or 1: in this process); pixels: what images
    have, and keep (None: photographs, which become JPEGs); converts: 8-bit RGB is made of what is no photograph.
    """

    samples_per_shard: int = 1000
    seed: int = 0
    short_side: int = 0
    workers: int | None = None
    pixels: Pixels | None = None
    converts: bool = True

    def describe(self, folder: ImageFolder) -> dict:
        """What makes a build the one it is, as its manifest records it."""
        what = {
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
            "num_images": len(folder.images),
            "listing": folder.fingerprint(),
        }
        what |= {"short_side": self.short_side} if self.short_side else {}
        return what | (self.pixels._asdict() if self.pixels else {})


DEFAULTS = Settings()


def plan_shards(
    source: Source,
    folder: ImageFolder,
    dst: str,
    what: dict,
    remote: Remote | None = None,
    converts: bool = True,
) -> list["Job"]:
    """The jobs of a build, one per shard, as ``what`` describes it. ``converts``: as in ``Job``."""
    # Imported here and not above: it imports torch, and a user's mistakes are told before that.
    from data_prep.shard import Job

    labels = {name: label for label, name in enumerate(folder.classes)}
    samples_per_shard, short_side = what["samples_per_shard"], what.get("short_side", 0)
    pixels = Pixels(what["channels"], what["bits"]) if "channels" in what else None
    order = permutation(len(folder.images), what["seed"], PERMUTATION)
    jobs = []
    for number, first in enumerate(range(0, len(order), samples_per_shard)):
        images = [folder.images[i] for i in order[first : first + samples_per_shard]]
        images = [(labels.get(image.class_name, -1), image) for image in images]
        jobs.append(Job(number, first, images, source, dst, short_side, pixels, converts, remote))
    return jobs


def run_jobs(jobs: list["Job"], dst: str, workers: int | None, quiet: bool) -> list[dict]:
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
            raise UserError(_full_disk(error, jobs, records)) from None
        except BrokenProcessPool:
            raise UserError(
                f"a worker was killed, perhaps for memory ({len(records)} of {len(jobs)} shards are finished "
                f"and kept): run the same command again with fewer than --workers {workers}"
            ) from None
    return [records[number] for number in sorted(records)]


def _full_disk(error, jobs, records):
    folder = jobs[0].dst  # where shards are made, also on their way into an object store
    sizes = [job.num_bytes() for job in jobs if job.number not in records]
    needed = max(sizes) if jobs[0].remote else sum(sizes)  # what is uploaded is gone from here
    return (
        f"no space for {folder}: {error.strerror}; {free_space(folder)}, about {needed / 1e6:,.1f} MB more are needed; "
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

    parent = multiprocessing.parent_process()
    assert parent is not None, "it is for processes that multiprocessing started"

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def manifest_of(records: list[dict], folder: ImageFolder, what: dict) -> Manifest:
    """The manifest of a build by the records of its shards. UserError where not one image could be used."""
    shards = ShardTable(ShardInfo(**record["info"]) for record in records)
    counts = np.zeros(len(folder.classes), np.int64)
    fixed = [note for record in records for note in record["fixed"]]
    lost = [note for record in records for note in record["rejected"]]
    rejected = [{"key": None, "source": name, "reason": reason} for name, reason in folder.skipped] + lost
    num_samples = sum(shards.counts)
    if not num_samples:
        last = rejected[-1]
        raise UserError(
            f"none of the {len(folder.images)} images can be used; {last['source']}: {last['reason']}"
        )
    labels = {name: label for label, name in enumerate(folder.classes)}
    lost = {note["source"] for note in lost}
    for image in folder.images:
        if image.class_name:
            counts[labels[image.class_name]] += image.name not in lost
    num_bytes = sum(shards.sizes)
    return Manifest(
        folder.classes,
        tuple(counts.tolist()),
        num_samples,
        num_bytes,
        shards,
        _bounded(fixed),
        _bounded(rejected),
        what,
    )


def _bounded(notes):
    """Not more notes than a manifest may hold to be read again."""
    more = len(notes) - MAX_NOTES
    if more <= 0:
        return notes
    return [*notes[:MAX_NOTES], {"key": None, "source": f"{more:,} more", "reason": "not listed here"}]
