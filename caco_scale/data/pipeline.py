"""What a worker does: planned samples -> decoded samples -> batches, as stages of a webdataset pipeline.

The plan, not the workers, decides what is in a batch: worker w of W prepares this rank's share of steps start + w,
start + w + W, ..., whole batches at a time.

Shapes: h = w a view's crop side.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from caco_scale.data.decode import decode
from caco_scale.data.in_memory import DecodedImages
from caco_scale.data.order import Order, key64, rank_share, sample_keys
from caco_scale.data.pixels import CorruptSample, Pixels
from caco_scale.data.samples import NoImage, image_in
from caco_scale.data.store.base import Store
from caco_scale.data.views import (
    ViewSpec,
    centre_crop,
    crop_resize_into,
    draw_colour,
    draw_crop,
)
from caco_scale.errors import UserError

SUBSTITUTE_STREAM = 0x5B57
SUBSTITUTE_TRIES = 16
# Images that a worker holds decoded at once while it draws their crops together.
CHUNK_IMAGES, CHUNK_BYTES = 64, 64 << 20
PREFETCH_STEPS = 8  # of a worker's own, whose shards are fetched ahead


@dataclass(frozen=True)
class TrainingJob:
    """What a worker must know to prepare any training batch of its rank."""

    store: Store
    order: Order
    views: tuple[ViewSpec, ...]
    rank: int
    world_size: int
    steps: range
    seed: int
    prefetch: bool
    images: DecodedImages | None = None  # those that some worker has decoded before


@dataclass(frozen=True)
class EvaluationJob:
    """What a worker must know to read its rank's part of a whole shard set."""

    store: Store
    size: int
    resize: int
    batches: tuple[Sequence[int] | NDArray[np.int64], ...]  # sample ids


class Undecodable(NamedTuple):
    """An image of a set under evaluation that does not decode: its number there, its label, its name, and why."""

    index: int
    label: int
    name: str
    error: str


def _mine(items):
    """The batches that this worker prepares: the DataLoader takes from the workers in turn."""
    worker = get_worker_info()
    return items if worker is None else items[worker.id :: worker.num_workers]


def planned_samples(job: TrainingJob) -> Iterator[dict]:
    """webdataset's sample dicts in training order, with ``__step__`` and the sample's number in ``__id__``.

    One whose image is in memory is not read: it has the image in ``__image__``, and its name.
    """
    steps, read = _mine(job.steps), functools.partial(_read, job.store)
    for number, step in enumerate(steps):
        if job.prefetch:
            for later in steps[number : number + PREFETCH_STEPS]:
                ids, shards, _ = _places(job, later)
                job.store.prefetch(np.unique(shards[~_held(job, ids)]).tolist())
        ids, shards, positions = _places(job, step)
        held = _held(job, ids)
        places = list(zip(shards.tolist(), positions.tolist(), strict=True))
        from_store = job.store.concurrently(read, [places[i] for i in np.flatnonzero(~held)])
        for sample_id, place, is_held in zip(ids.tolist(), places, held.tolist(), strict=True):
            sample = _from_memory(job, sample_id, place) if is_held else next(from_store)
            sample.update(__step__=step, __id__=sample_id)
            yield sample


def _places(job, step):
    """Ids, shards and positions of this rank's samples of a step."""
    ids = job.order.share(step, job.rank, job.world_size)
    return ids, *job.order.locate(ids)


def _held(job, ids):
    """Which of the samples have their decoded image in memory: (n,) -> (n,)."""
    return np.zeros(len(ids), bool) if job.images is None else job.images.held(ids)


def _from_memory(job, sample_id, place):
    return {**_origin(job.store, place), "__image__": job.images.get(sample_id)}


def decoded_samples(job: TrainingJob, samples: Iterable[dict]) -> Iterator[dict]:
    """Add the decoded ``__image__``, the substitute's if need be; ``__corrupt__`` is None or the report."""
    for sample in samples:
        sample["__corrupt__"] = None
        try:
            if "__image__" not in sample:
                sample["__image__"] = _decode_and_keep(job, sample["__id__"], sample)
        except CorruptSample as error:
            epoch = sample["__step__"] // job.order.steps_per_epoch
            sample["__image__"], substitute = _substitute(job, epoch, sample["__id__"], error)
            report = {"key": _name(sample), "error": str(error), "substitute": substitute}
            sample["__corrupt__"] = report
        yield sample


def _decode_and_keep(job, sample_id, sample):
    image = _decode(job.store, sample)
    if job.images is not None:
        job.images.put(sample_id, image)
    return image


def training_batches(job: TrainingJob, samples: Iterable[dict]) -> Iterator[dict]:
    """Join the samples of each step into one batch: crops, parameters, keys."""
    samples, size = iter(samples), job.order.global_batch_size // job.world_size
    for step in _mine(job.steps):
        epoch, group = step // job.order.steps_per_epoch, itertools.islice(samples, size)
        rounds = rank_share(job.order.rounds(step), job.rank, job.world_size)
        crops = [_no_crops(size, spec.size, job.store.pixels) for spec in job.views]
        ids, keys, corrupt = [], [], []
        for chunk in _chunks(group):
            rows = range(len(ids), len(ids) + len(chunk))
            ids += [sample["__id__"] for sample in chunk]
            keys += [_name(sample) for sample in chunk]
            corrupt += [sample["__corrupt__"] for sample in chunk if sample["__corrupt__"]]
            images = [sample["__image__"] for sample in chunk]
            heights, widths = np.array([image.shape[:2] for image in images]).T
            for view, spec in enumerate(job.views):
                random = sample_keys(job.seed, rounds[rows.start : rows.stop], ids[rows.start :], view)
                boxes = draw_crop(spec, random, heights, widths)
                crop_resize_into(crops[view][rows.start : rows.stop], images, boxes)
        # As numpy, which travels in the message: every tensor costs the receiver a file descriptor.
        params = [draw_colour(s, sample_keys(job.seed, rounds, ids, v)) for v, s in enumerate(job.views)]
        yield {
            "step": step,
            "epoch": epoch,
            "keys": keys,
            "crops": crops,
            "params": params,
            "corrupt": corrupt,
            "counters": job.store.counters.take(),
        }


def _no_crops(count: int, size: int, pixels: Pixels) -> torch.Tensor:
    """Room for crops (count, size, size, C)."""
    dtype = torch.uint8 if pixels.bits == 8 else torch.uint16
    return torch.empty(count, size, size, pixels.channels, dtype=dtype)


def evaluation_reader(job: EvaluationJob) -> Iterator[dict]:
    """Centre crops, labels and numbers of the job's batches."""
    for batch in _mine(job.batches):
        indices, images, labels, corrupt = [], [], [], []
        shards, positions = job.store.locate(batch)
        labels_of = {}
        for shard in np.unique(shards).tolist():  # in order: whole shards are read
            job.store.fetch(shard)
            labels_of[shard] = job.store.index(shard).labels
        places = list(zip(shards.tolist(), positions.tolist(), strict=True))
        samples = job.store.concurrently(functools.partial(_read, job.store), places)
        for index, (shard, position), sample in zip(batch, places, samples, strict=True):
            label = int(labels_of[shard][position])
            try:
                images.append(centre_crop(_decode(job.store, sample), job.size, job.resize))
            except CorruptSample as error:
                corrupt.append(Undecodable(int(index), label, _name(sample), str(error)))
                continue
            indices.append(index)
            labels.append(label)
        crops = torch.from_numpy(np.stack(images)) if images else _no_crops(0, job.size, job.store.pixels)
        tensors = {"indices": torch.tensor(indices, dtype=torch.int64), "crops": crops}
        more = {"corrupt": corrupt, "counters": job.store.counters.take()}
        yield {**tensors, "labels": torch.tensor(labels, dtype=torch.int64), **more}


def _read(store, place):
    """One webdataset sample dict, with what :func:`_origin` says of it."""
    sample = store.read_sample(*place)
    sample.update(_origin(store, place, sample["__key__"]))
    return sample


def _origin(store, place, key=None):
    """Where a sample is from, ``__place__`` (shard, position) and ``__url__``, and its ``__key__``."""
    shard, position = place
    name = store.manifest.shards[shard].name
    return {"__place__": place, "__url__": name, "__key__": key or store.index(shard).keys[position]}


def _name(sample):
    return f"{sample['__url__']}/{sample['__key__']}"


def _decode(store, sample):
    """The sample's image. CorruptSample only if the shard's bytes are the recorded ones, else UserError."""
    try:
        return _decode_bytes(store, sample)
    except CorruptSample:
        store.learn_checksums(sample["__place__"][0])
        again = _read(store, sample["__place__"])
        if all(again.get(name) == value for name, value in sample.items() if isinstance(value, bytes)):
            raise
    return _decode_bytes(
        store, again
    )  # there was no checksum, and a cached copy was damaged, or a byte on its way


def _decode_bytes(store, sample):
    try:
        data = image_in(sample)
    except NoImage as error:
        raise CorruptSample(str(error)) from None
    return decode(data, store.pixels)


def _substitute(job, epoch, sample_id, error):
    """The image that stands in for a corrupt sample, and its name: the first candidate of a fixed row to decode."""
    for attempt in range(SUBSTITUTE_TRIES):
        key = key64(job.seed, epoch, sample_id, attempt, SUBSTITUTE_STREAM)
        candidate = int(key % np.uint64(job.order.num_samples))
        shard, position = job.order.locate([candidate])
        place = int(shard[0]), int(position[0])
        if _held(job, [candidate])[0]:
            sample = _from_memory(job, candidate, place)
            return sample["__image__"], _name(sample)
        sample = _read(job.store, place)
        try:
            return _decode_and_keep(job, candidate, sample), _name(sample)
        except CorruptSample:
            continue
    raise UserError(
        f"sample {sample_id} of {job.store.url} does not decode ({error}), nor do {SUBSTITUTE_TRIES} others "
        f"drawn in its place: {job.store.verify_hint}"
    )


def _chunks(samples):
    """Lists of decoded samples, bounded by number and bytes."""
    chunk, num_bytes = [], 0
    for sample in samples:
        chunk.append(sample)
        num_bytes += sample["__image__"].nbytes
        if len(chunk) == CHUNK_IMAGES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def errors_as_data(payloads: Iterable[dict]) -> Iterator[dict]:
    """A user's mistake crosses to the trainer as data: torch would wrap it in a worker's traceback."""
    try:
        yield from payloads
    except UserError as error:
        yield {"user_error": str(error)}
