"""One shard, built by a worker: read the images, write the tar, its index and its record.

A shard is written under another name, synced and renamed before its record is written: what has a record is
whole.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from caco_scale.atomic import atomic_file, write_atomically
from caco_scale.data.folders import Image
from caco_scale.data.object_store import Remote
from caco_scale.data.pixels import CorruptSample, Pixels
from caco_scale.data.shard_index import INDEX_SUFFIXES, ShardIndex
from caco_scale.data.shard_table import ShardInfo
from caco_scale.data.shards import BLOCK
from data_prep.destination import (
    STATE_DIR,
    file_sha256,
    record_name,
    record_path,
    shard_name,
    write_record,
)
from data_prep.images import prepare_exact, prepare_image, refuse_mixture
from data_prep.tar import Source

# Tar headers, padding, label and notes of a sample, for the estimate of the space that is needed.
SAMPLE_OVERHEAD_BYTES = 2560


@dataclass(frozen=True)
class Job:
    """One shard: its number, the slot of its first image, its images in order with their labels (-1: it has none).

    ``pixels``: what images have, and keep; None: they are photographs. ``converts``: images of other kinds become
    photographs, instead of ending the build.
    """

    number: int
    first: int
    images: list[tuple[int, Image]]
    source: Source
    dst: str
    short_side: int = 0
    pixels: Pixels | None = None
    converts: bool = True
    remote: Remote | None = None  # the shard goes there, and ``dst`` is only where it is made
    kept: dict | None = None  # the record of the shard, if it is in the object store already

    @property
    def state(self) -> str:
        """Where the records of finished shards lie."""
        return os.path.join(self.dst, STATE_DIR)

    def num_bytes(self) -> int:
        """About how many bytes the shard will have."""
        return sum(image.file.num_bytes + SAMPLE_OVERHEAD_BYTES for _, image in self.images)


def build_shard(job: Job) -> tuple[dict, bool]:
    """Build a shard, unless its record and its files agree; returns (record, was it there before)."""
    record = job.kept if job.remote else _kept_record(job)
    if record:
        return record, True
    name = shard_name(job.number)
    path = os.path.join(job.dst, name)
    with atomic_file(path) as file:
        output = _HashingFile(file)
        samples, checksums, fixed, rejected = _write_samples(job, name, output)
    index = ShardIndex.from_samples(samples, checksums).to_bytes()
    index_name = name.removesuffix(".tar") + INDEX_SUFFIXES[True]
    write_atomically(os.path.join(job.dst, index_name), index)
    index_hash = hashlib.sha256(index).hexdigest()
    info = ShardInfo(
        name, len(samples), output.num_bytes, output.hash.hexdigest(), index_name, len(index), index_hash
    )
    record = {"info": asdict(info), "fixed": fixed, "rejected": rejected}
    if job.remote:
        _upload(job, info, record)
    else:
        write_record(job.state, job.number, record)
    return record, False


def _upload(job, info, record):
    """The tar in parts, then its index, then the record: what has one is whole."""
    for name in (info.name, info.index_name):
        path = Path(job.dst, name)
        job.remote.write(name, path)
        path.unlink()
    job.remote.write(record_name(job.number), json.dumps(record).encode())


class _HashingFile:
    """A file that counts and hashes what is written to it; ``span`` has the checksum since it was last reset."""

    def __init__(self, file):
        self.file, self.hash, self.span, self.num_bytes = file, hashlib.sha256(), xxhash.xxh3_64(), 0

    def write(self, data):
        self.hash.update(data)
        self.span.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)


def _write_samples(job, shard, output):
    """Write the shard's tar; returns samples and checksums for its index, and what was fixed and rejected."""
    samples, checksums, fixed, rejected, start = [], [], [], [], 0
    for slot, (label, image) in enumerate(job.images, job.first):
        key, note = f"{slot:08d}", {"source": image.name}
        try:
            extension, data, reason = _prepare(job, image)
        except CorruptSample as error:
            rejected.append({"key": f"{shard}/{key}", "source": image.name, "reason": str(error)})
            continue
        if reason:
            fixed.append({"key": f"{shard}/{key}", "source": image.name, "reason": reason})
            note["fixed"] = reason
        members = {extension: data, "json": json.dumps(note).encode()}
        members |= {"cls": str(label).encode()} if label >= 0 else {}
        output.span.reset()
        places, size = _write_members(key, members, output)
        samples.append((key, start, size, label, places))
        checksums.append(output.span.intdigest())
        start += size
    # The end of a tar: two empty blocks, filled up to a whole record.
    end = start + 2 * BLOCK
    output.write(bytes(2 * BLOCK + -end % tarfile.RECORDSIZE))
    return samples, checksums, fixed, rejected


def _prepare(job, image):
    """(extension, bytes to store, None or what was changed) of an image; CorruptSample, and UserError for a mixture."""
    data = job.source.read(image.file)
    if not job.converts:
        refuse_mixture(data, image.name, job.pixels, (job.source.read(i.file) for _, i in job.images))
    if job.pixels:
        return prepare_exact(data, job.pixels, job.short_side)
    return "jpg", *prepare_image(data, job.short_side)


def _write_members(key, members, output):
    """Write the files of a sample; returns their (extension, offset, size) in it, and the bytes written.

    The bytes are those of webdataset's TarWriter. Its stream, closed by the garbage collector, would write (and
    complain) once more after a full disk.
    """
    places, offset = [], 0
    for extension, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{extension}")  # time, user and group are 0 and empty
        info.size, info.mode = len(data), 0o444
        output.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
        places.append((extension, offset + BLOCK, len(data)))
        offset += BLOCK + len(data) + -len(data) % BLOCK
    return places, offset


def _kept_record(job):
    """The record of a shard that an earlier run finished, if its files still have the recorded bytes."""
    try:
        with open(record_path(job.state, job.number), encoding="utf-8") as file:
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
