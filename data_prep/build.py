"""Build a shard set: one seeded global permutation of the images, cut into shards built independently.

Slot g of the permutation is the sample with key ``{g:08d}``, in shard ``g // samples_per_shard``. A rejected
image leaves its slot empty, so that a shard depends on nothing but the listing and the seed: any number of
workers, in any order, after any number of kills, writes the same bytes.

While a build runs, ``DST/.build`` holds what was asked (``build.json``) and a record of every finished shard.
A shard is written under another name, synced and renamed before its record is written; ``manifest.json``
comes last and ``.build`` is removed after it.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from caco_scale.data.order import permutation
from caco_scale.data.shards import BLOCK, MANIFEST_NAME, Manifest, ShardIndex, ShardInfo
from caco_scale.data.store import LocalStore
from caco_scale.data.views import CorruptSample
from caco_scale.errors import UserError
from data_prep.images import prepare_image
from data_prep.progress import BuildProgress
from data_prep.sources import SCRATCH_FILES, Image, compression, image_folders, open_source

PERMUTATION = 77  # sets the order of a build apart from the orders of training
STATE_DIR = ".build"
SAMPLE_OVERHEAD_BYTES = (
    2560  # tar headers, padding, label and notes of a sample, for the estimate of a full disk
)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    _check_apart(src, dst)
    with ExitStack() as stack:
        stack.enter_context(_destination_errors(dst))
        packed = os.path.exists(src) and compression(src) is not None
        if packed:
            stack.enter_context(_scratch_removed(dst, existed=os.path.isdir(dst)))
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
        stack.enter_context(_destination_errors(dst))
        manifest = _finished(dst, what)
        if not manifest and not locked_already:
            stack.enter_context(locked(dst, wait))
            manifest = _finished(dst, what)  # another process may have just built it
        if manifest:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
            return manifest, True
        _prepare_destination(dst, what)
        jobs = _jobs(source, folder, dst, samples_per_shard, seed)
        records = _run(jobs, dst, workers, quiet)
        manifest = _manifest(records, folder, what)
        write_atomically(os.path.join(dst, MANIFEST_NAME), manifest.to_json().encode())
        if not locked_already:
            shutil.rmtree(os.path.join(dst, STATE_DIR), ignore_errors=True)
        return manifest, False


# ---- the destination: what it holds, who uses it, what can go wrong with it


def _check_apart(src, dst):
    source, target = os.path.realpath(src), os.path.realpath(dst)
    if os.path.isdir(source) and (target == source or target.startswith(source.rstrip("/") + "/")):
        raise UserError(f"the destination {dst} lies inside the source {src}: choose a directory outside it")


@contextmanager
def _destination_errors(dst):
    """An OSError of writing becomes one line; reading the source raises a UserError of its own."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise UserError(
                f"no space for {dst}: {error.strerror}; {_free(dst)}; free some and run it again"
            ) from None
        raise UserError(f"cannot write to {dst}: {error.strerror} ({error.filename})") from None


def _free(path):
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return f"{shutil.disk_usage(path).free / 1e6:,.1f} MB are free there"


@contextmanager
def locked(dst, wait=False):
    """Hold the lock of a destination, so that two builds never write it at once; makes ``dst/.build``."""
    state = os.path.join(dst, STATE_DIR)
    path = os.path.join(state, "lock")
    while True:
        os.makedirs(state, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 (closed below; the lock lives as long as the file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another build is writing {dst}: wait for it, or stop it and run this again"
            ) from None
        file.close()  # the holder before us removed the directory when it had finished
    with file:
        yield


@contextmanager
def _scratch_removed(dst, existed):
    """Remove the decompressed source when a build fails before its first shard (say, an empty class)."""
    try:
        yield
    except UserError:
        state = Path(dst, STATE_DIR)
        begun = any(
            re.fullmatch(r"\d{6}\.json", path.name) for path in Path(dst).glob(f"**/{STATE_DIR}/*.json")
        )
        if state.is_dir() and not begun:
            for name in SCRATCH_FILES:
                (state / name).unlink(missing_ok=True)
            if {path.name for path in state.iterdir()} <= {"lock"}:
                shutil.rmtree(state)
            if not existed and not any(Path(dst).iterdir()):
                os.rmdir(dst)
        raise


def _finished(dst, what):
    """The manifest in ``dst`` if it is this build's and all files are there; None if there is work to do.

    UserError when ``dst`` holds another build, finished or not. Damaged shards of a finished build are
    forgotten: it becomes an unfinished build that keeps the good ones.
    """
    state = os.path.join(dst, STATE_DIR, "build.json")
    if os.path.exists(os.path.join(dst, MANIFEST_NAME)):
        store = LocalStore(dst)
        _same_build(dst, store.manifest.build, what)
        try:
            store.check()
        except UserError:
            return None
        return store.manifest
    if os.path.exists(state):
        with open(state, encoding="utf-8") as file:
            _same_build(dst, json.load(file), what)
    elif os.path.exists(os.path.join(dst, shard_name(0))):
        raise UserError(
            f"{dst} holds {shard_name(0)}, but not from a build of this program: choose another directory"
        )
    return None


def _same_build(dst, there, here):
    if there == here:
        return
    names = {"num_images": "images in the source", "listing": "source listing"}
    differ = [
        names.get(key, key.replace("_", " "))
        + ("" if key == "listing" else f" {there.get(key)} there, {here[key]} now")
        for key in here
        if there.get(key) != here[key]
    ]
    raise UserError(f"{dst} holds another build ({'; '.join(differ)}): choose another directory or remove it")


def _prepare_destination(dst, what):
    """Make ``dst/.build`` ready; the good shards of a damaged finished build become its finished shards."""
    state = os.path.join(dst, STATE_DIR)
    os.makedirs(state, exist_ok=True)
    for folder in (dst, state):
        for name in os.listdir(folder):
            if name.endswith(".tmp"):  # of a killed run
                os.unlink(os.path.join(folder, name))
    path = os.path.join(dst, MANIFEST_NAME)
    write_atomically(os.path.join(state, "build.json"), json.dumps(what).encode())
    if os.path.exists(path):
        manifest = LocalStore(dst).manifest
        for number, info in enumerate(manifest.shards):
            notes = {
                kind: [n for n in getattr(manifest, kind) if (n["key"] or "").startswith(info.name + "/")]
                for kind in ("fixed", "rejected")
            }
            _write_record(state, number, {"info": asdict(info), **notes})
        os.unlink(path)


def write_atomically(path, data):
    """Write a file that appears complete or not at all, also when the machine stops."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            _sync(file)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


# ---- one shard, built by a worker


def shard_name(number):
    return f"{number:06d}.tar"


@dataclass(frozen=True)
class Job:
    """One shard: its number, the slot of its first image, its images in order with their labels."""

    number: int
    first: int
    images: list[tuple[int, Image]]
    source: object
    dst: str

    @property
    def state(self):
        return os.path.join(self.dst, STATE_DIR)

    def num_bytes(self):
        """About how many bytes the shard will have."""
        return sum(image.file.num_bytes + SAMPLE_OVERHEAD_BYTES for _, image in self.images)


def _jobs(source, folder, dst, samples_per_shard, seed):
    labels = {name: label for label, name in enumerate(folder.classes)}
    order = permutation(len(folder.images), seed, PERMUTATION)
    jobs = []
    for number, first in enumerate(range(0, len(order), samples_per_shard)):
        images = [folder.images[i] for i in order[first : first + samples_per_shard]]
        images = [(labels[image.class_name], image) for image in images]
        jobs.append(Job(number, first, images, source, dst))
    return jobs


def build_shard(job):
    """Build a shard, unless its record and its files agree; returns (record, was it there before)."""
    record = _kept_record(job)
    if record:
        return record, True
    name = shard_name(job.number)
    path = os.path.join(job.dst, name)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            output = _HashingFile(file)
            samples, fixed, rejected = _write_samples(job, name, output)
            _sync(file)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    index = ShardIndex.from_samples(samples).to_bytes()
    index_name = name.removesuffix(".tar") + ".idx"
    write_atomically(os.path.join(job.dst, index_name), index)
    index_hash = hashlib.sha256(index).hexdigest()
    info = ShardInfo(
        name, len(samples), output.num_bytes, output.hash.hexdigest(), index_name, len(index), index_hash
    )
    record = {"info": asdict(info), "fixed": fixed, "rejected": rejected}
    _write_record(job.state, job.number, record)
    return record, False


class _HashingFile:
    """A file that counts and hashes what is written to it."""

    def __init__(self, file):
        self.file, self.hash, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data):
        self.hash.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)


def _write_samples(job, shard, output):
    """Write the shard's tar; returns the samples for its index, and what was fixed and rejected."""
    samples, fixed, rejected, start = [], [], [], 0
    writer = TarWriter(output, encoder=False, mtime=0, user="", group="", mode=0o444)
    for slot, (label, image) in enumerate(job.images, job.first):
        key, note = f"{slot:08d}", {"source": image.name}
        try:
            data, reason = prepare_image(job.source.read(image.file))
        except CorruptSample as error:
            rejected.append({"key": f"{shard}/{key}", "source": image.name, "reason": str(error)})
            continue
        if reason:
            fixed.append({"key": f"{shard}/{key}", "source": image.name, "reason": reason})
            note["fixed"] = reason
        members = {"cls": str(label).encode(), "jpg": data, "json": json.dumps(note).encode()}
        writer.write({"__key__": key, **members})
        # The layout TarWriter gives: by extension, a block of header, the bytes filled up to whole blocks.
        offset, places = 0, []
        for extension in sorted(members):
            places.append((extension, offset + BLOCK, len(members[extension])))
            offset += BLOCK + -(-len(members[extension]) // BLOCK) * BLOCK
        samples.append((key, start, offset, label, places))
        start += offset
        assert writer.tarstream.offset == start
    writer.close()
    return samples, fixed, rejected


def _record_path(state, number):
    return os.path.join(state, f"{number:06d}.json")


def _write_record(state, number, record):
    write_atomically(_record_path(state, number), json.dumps(record).encode())


def _kept_record(job):
    """The record of a shard that an earlier run finished, if its files still have the recorded bytes."""
    try:
        with open(_record_path(job.state, job.number), encoding="utf-8") as file:
            record = json.load(file)
        info = ShardInfo(**record["info"])
        for name, size, sha256 in (
            (info.name, info.num_bytes, info.sha256),
            (info.index_name, info.index_num_bytes, info.index_sha256),
        ):
            path = os.path.join(job.dst, name)
            if os.path.getsize(path) != size or file_sha256(path) != sha256:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return record


def file_sha256(path):
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- all shards


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
                f"a worker was killed, perhaps for memory ({len(records)} of {len(jobs)} shards are finished and "
                f"kept): run the same command again with fewer than --workers {workers}"
            ) from None
    return [records[number] for number in sorted(records)]


def _full_disk(error, jobs, records, dst):
    needed = sum(job.num_bytes() for job in jobs if job.number not in records)
    return (
        f"no space for {dst}: {error.strerror}; {_free(dst)}, about {needed / 1e6:,.1f} MB more are needed; "
        f"{len(records)} of {len(jobs)} shards are finished and kept: free some and run it again"
    )


def _results(jobs, workers):
    """(job, result of build_shard) for every job, as they finish; a failure lets shards in work finish."""
    if workers <= 1:
        for job in jobs:
            yield job, build_shard(job)
        return
    # forkserver: its children neither copy this process nor import numpy and webdataset one by one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.build"])
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
    rejected = [{"key": None, "source": name, "reason": reason} for name, reason in folder.skipped]
    rejected += [note for record in records for note in record["rejected"]]
    num_samples = sum(shard.num_samples for shard in shards)
    if not num_samples:
        last = rejected[-1]
        raise UserError(
            f"none of the {len(folder.images)} images can be used; {last['source']}: {last['reason']}"
        )
    labels = {name: label for label, name in enumerate(folder.classes)}
    lost = {note["source"] for note in rejected}
    for image in folder.images:
        counts[labels[image.class_name]] += image.name not in lost
    num_bytes = sum(shard.num_bytes for shard in shards)
    return Manifest(
        folder.classes, tuple(counts.tolist()), num_samples, num_bytes, shards, fixed, rejected, what
    )
