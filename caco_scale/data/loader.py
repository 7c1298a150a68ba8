"""Batches of uint8 crops and their random parameters, prepared by worker processes in the order of the run.

A webdataset pipeline (planned samples -> decoded samples -> batches) inside a torch DataLoader. The plan, not
the workers, decides what is in a batch: worker w of W prepares this rank's share of steps start + w, start +
w + W, ..., whole batches at a time, and the DataLoader hands them out in turn. So a run's batches are the
same with any number of workers, also none, and the global batches the same at any number of ranks.

Workers come from a fork server that has imported this module and nothing of the trainer: no CUDA, no fork of a
process with threads. Signals for the process group (Ctrl-C, a scheduler's SIGTERM and SIGUSR1) do not reach them,
because the trainer still wants batches while it saves its last checkpoint; but they die with it, however it dies.

Shapes: B this rank's batch, h = w a view's crop side.
"""

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from webdataset import DataPipeline

from caco_scale.data.order import Order, key64, rank_share, sample_keys
from caco_scale.data.shards import read_sample
from caco_scale.data.views import (
    CorruptSample,
    ViewSpec,
    centre_crop,
    crop_resize,
    decode_image,
    draw_colour,
    draw_crop,
)
from caco_scale.distributed.collectives import exchange_timeout
from caco_scale.errors import UserError, one_line
from caco_scale.run.signals import end_with_trainer, shielded

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
SUBSTITUTE_STREAM = 0x5B57
SUBSTITUTE_TRIES = 16
# Images that a worker holds decoded at once while it draws their crops together.
CHUNK_IMAGES, CHUNK_BYTES = 64, 64 << 20
LAST_WORD_SECONDS = 5  # for workers that were killed
PREFETCH_STEPS = 8  # of a worker's own, whose shards are fetched ahead


@dataclass
class Batch:
    """This rank's share of one global batch.

    keys: planned samples as "shard/key", in batch order. crops: one (B, h, w, 3) uint8 per view. params: one
    dict per view of tensors with first axis B, for ``augment``. Both come on the CPU; ``transfer.on_device`` moves
    them. corrupt: samples that did not decode, as {"key", "error", "substitute"}; their rows hold the substitute's
    pixels under the planned sample's random numbers.
    """

    step: int
    epoch: int
    keys: list[str]
    crops: list[torch.Tensor]
    params: list[dict[str, torch.Tensor]]
    corrupt: list[dict]


@dataclass(frozen=True)
class _Training:
    """What a worker must know to prepare any training batch of its rank."""

    store: object
    order: Order
    views: tuple[ViewSpec, ...]
    rank: int
    world_size: int
    steps: range
    seed: int
    prefetch: bool


@dataclass(frozen=True)
class _Evaluation:
    """What a worker must know to read its rank's part of a whole shard set."""

    store: object
    size: int
    batches: tuple  # sample ids: ranges, or arrays of int64


def train_batches(store, order, views, *, rank, world_size, start_step, num_steps, seed, workers):
    """This rank's training batches of steps ``start_step`` to ``num_steps`` - 1, counted over the whole run.

    store: where shards are; order: :class:`Order` of its samples; views: list of ViewSpec, one crop tensor
    for each. Nothing crosses ranks. With ``workers`` 0 everything runs in this process, else they start at
    the call, not at the first batch. Returns an iterator of :class:`Batch`; closing it ends the workers.

    A sample that does not decode is replaced by a random one that depends only on (seed, epoch, sample).
    Raises UserError at the call when the ranks do not divide the global batch, and while iterating when a
    shard is not as its manifest says, a worker dies, or none gives a batch for ``collectives.exchange_timeout()``.
    """
    rank_share(order.batch(start_step), rank, world_size)  # not divisible: an error now and in this process
    steps = range(start_step, num_steps)
    prefetch = cache_is_large_enough(store, order, start_step)
    job = _Training(store, order, tuple(views), rank, world_size, steps, seed, prefetch)
    stages = (_planned_samples, _decoded_samples, _training_batches)
    return _training_stream(
        _stream([functools.partial(stage, job) for stage in stages], workers), start_step, store
    )


def cache_is_large_enough(store, order, step):
    """Does the store's cache hold all shards that are in use at once? Else whole shards are not worth fetching.

    They would be evicted before they were read again. A lane reads from one window at a time.
    """
    epoch, position = divmod(step, order.steps_per_epoch)
    steps = -(-order.window * order.lanes // order.global_batch_size)
    start = position * order.global_batch_size
    ids = order.epoch(epoch)[start : start + steps * order.global_batch_size]
    return store.can_prefetch(np.unique(order.locate(ids)[0]))


def evaluation_batches(store, size, *, rank, world_size, batch_size, workers, ids=None):
    """This rank's part of a shard set for evaluation: every sample exactly once over the ranks, centre-cropped.

    ids: ascending numbers of the samples to read, (n,); None: all of the set.

    Returns an iterator of (indices (b,) int64 in the set, crops (b, size, size, 3) uint8, labels (b,) int64,
    -1 where there is none), in index order; ranks take contiguous parts that differ by at most one sample. A
    sample that does not decode is left out with a warning that names it. Raises as :func:`train_batches`.
    """
    ids = range(store.manifest.num_samples) if ids is None else ids
    start, stop = (len(ids) * r // world_size for r in (rank, rank + 1))
    batches = tuple(ids[b : min(b + batch_size, stop)] for b in range(start, stop, batch_size))
    job = _Evaluation(store, size, batches)
    return _evaluation_stream(_stream([functools.partial(_evaluation_reader, job)], workers), store)


def _training_stream(payloads, start_step, store):
    with contextlib.closing(payloads):
        for step, payload in enumerate(payloads, start_step):
            assert payload["step"] == step, "the workers' batches are out of order"
            store.add_counters(payload.pop("counters"))
            params = [{k: torch.from_numpy(v) for k, v in p.items()} for p in payload.pop("params")]
            yield Batch(params=params, **payload)


def _evaluation_stream(payloads, store):
    with contextlib.closing(payloads):
        for payload in payloads:
            store.add_counters(payload["counters"])
            for line in payload["corrupt"]:
                warnings.warn(f"left out of the evaluation: {line}", stacklevel=3)
            yield payload["indices"], payload["crops"], payload["labels"]


# ----------------------------------------------------------------------------------------------------
# The pipeline: runs in the workers


def _mine(items):
    """The batches that this worker prepares: the DataLoader takes from the workers in turn."""
    worker = get_worker_info()
    return items if worker is None else items[worker.id :: worker.num_workers]


def _planned_samples(job):
    """webdataset's sample dicts in training order, with ``__step__`` and the sample's number in ``__id__``."""
    steps, read = _mine(job.steps), functools.partial(_read, job.store)
    for number, step in enumerate(steps):
        if job.prefetch:
            for later in steps[number : number + PREFETCH_STEPS]:
                job.store.prefetch(np.unique(_places(job, later)[1]))
        ids, shards, positions = _places(job, step)
        places = zip(shards.tolist(), positions.tolist(), strict=True)
        for sample_id, sample in zip(ids.tolist(), job.store.concurrently(read, places), strict=True):
            sample.update(__step__=step, __id__=sample_id)
            yield sample


def _places(job, step):
    """Ids, shards and positions of this rank's samples of a step."""
    ids = rank_share(job.order.batch(step), job.rank, job.world_size)
    return ids, *job.order.locate(ids)


def _decoded_samples(job, samples):
    """Add the decoded ``image``, the substitute's if need be; ``__corrupt__`` is None or the report."""
    for sample in samples:
        sample["__corrupt__"] = None
        try:
            sample["image"] = _decode(job.store, sample)
        except CorruptSample as error:
            epoch = sample["__step__"] // job.order.steps_per_epoch
            sample["image"], substitute = _substitute(job, epoch, sample["__id__"], error)
            report = {"key": _name(sample), "error": str(error), "substitute": substitute}
            sample["__corrupt__"] = report
        yield sample


def _training_batches(job, samples):
    """Join the samples of each step into one batch: crops, parameters, keys."""
    samples, size = iter(samples), job.order.global_batch_size // job.world_size
    for step in _mine(job.steps):
        epoch, group = step // job.order.steps_per_epoch, itertools.islice(samples, size)
        crops = [torch.empty(size, spec.size, spec.size, 3, dtype=torch.uint8) for spec in job.views]
        ids, keys, corrupt = [], [], []
        for chunk in _chunks(group):
            rows = range(len(ids), len(ids) + len(chunk))
            ids += [sample["__id__"] for sample in chunk]
            keys += [_name(sample) for sample in chunk]
            corrupt += [sample["__corrupt__"] for sample in chunk if sample["__corrupt__"]]
            images = [sample["image"] for sample in chunk]
            heights, widths = np.array([image.shape[:2] for image in images]).T
            for view, spec in enumerate(job.views):
                random = sample_keys(job.seed, epoch, ids[rows.start :], view)
                pixels = crops[view].numpy()
                for row, image, box in zip(
                    rows, images, draw_crop(spec, random, heights, widths), strict=True
                ):
                    pixels[row] = crop_resize(image, box, spec.size)
        # As numpy, which travels in the message: every tensor costs the receiver a file descriptor.
        params = [draw_colour(s, sample_keys(job.seed, epoch, ids, v)) for v, s in enumerate(job.views)]
        yield {
            "step": step,
            "epoch": epoch,
            "keys": keys,
            "crops": crops,
            "params": params,
            "corrupt": corrupt,
            "counters": job.store.take_counters(),
        }


def _evaluation_reader(job):
    first = np.concatenate([[0], np.cumsum([info.num_samples for info in job.store.manifest.shards])])
    for batch in _mine(job.batches):
        indices, images, labels, corrupt = [], [], [], []
        shards = np.searchsorted(first, np.asarray(batch), side="right") - 1
        for shard in np.unique(shards):  # in order: whole shards are read
            job.store.fetch(int(shard))
        places = [(int(shard), index - int(first[shard])) for shard, index in zip(shards, batch, strict=True)]
        samples = job.store.concurrently(functools.partial(_read, job.store), places)
        for index, sample in zip(batch, samples, strict=True):
            try:
                images.append(centre_crop(_decode(job.store, sample), job.size))
            except CorruptSample as error:
                corrupt.append(f"{_name(sample)}: {error}")
                continue
            indices.append(index)
            labels.append(sample["__label__"])
        crops = np.stack(images) if images else np.empty((0, job.size, job.size, 3), np.uint8)
        tensors = {"indices": torch.tensor(indices, dtype=torch.int64), "crops": torch.from_numpy(crops)}
        more = {"corrupt": corrupt, "counters": job.store.take_counters()}
        yield {**tensors, "labels": torch.tensor(labels, dtype=torch.int64), **more}


def _read(store, place, checked=False):
    """One webdataset sample dict, with where it is from in ``__place__`` (shard, position) and ``__url__``."""
    shard, position = place
    index = store.index(shard)
    read = store.read_checked if checked else store.read
    sample = read_sample(index, position, read(shard, *index.span(position)))
    url = store.manifest.shards[shard].name
    sample.update(__place__=place, __url__=url, __label__=int(index.labels[position]))
    return sample


def _name(sample):
    return f"{sample['__url__']}/{sample['__key__']}"


def _decode(store, sample):
    """The sample's image. CorruptSample only if the shard's bytes are the recorded ones, else UserError."""
    try:
        return _decode_bytes(sample)
    except CorruptSample:
        again = _read(store, sample["__place__"], checked=True)
        if all(again.get(name) == value for name, value in sample.items() if isinstance(value, bytes)):
            raise
    return _decode_bytes(again)  # a cached copy was damaged, or a byte on its way


def _decode_bytes(sample):
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return decode_image(sample[extension])
    found = ", ".join(key for key in sample if not key.startswith("__")) or "nothing"
    raise CorruptSample(f"no image file (one of {', '.join(IMAGE_EXTENSIONS)}) but {found}")


def _substitute(job, epoch, sample_id, error):
    """The image that stands in for a corrupt sample, and its name: the first candidate of a fixed row to decode."""
    for attempt in range(SUBSTITUTE_TRIES):
        key = key64(job.seed, epoch, sample_id, attempt, SUBSTITUTE_STREAM)
        shard, position = job.order.locate([int(key % np.uint64(job.order.num_samples))])
        sample = _read(job.store, (int(shard[0]), int(position[0])))
        try:
            return _decode(job.store, sample), _name(sample)
        except CorruptSample:
            continue
    raise UserError(
        f"sample {sample_id} of {job.store.url} does not decode ({error}), nor do {SUBSTITUTE_TRIES} others "
        "drawn in its place: check the set with `python -m data_prep verify --full`"
    )


def _chunks(samples):
    """Lists of decoded samples, bounded by number and bytes."""
    chunk, num_bytes = [], 0
    for sample in samples:
        chunk.append(sample)
        num_bytes += sample["image"].nbytes
        if len(chunk) == CHUNK_IMAGES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _errors_as_data(payloads):
    """A user's mistake crosses to the trainer as data: torch would wrap it in a worker's traceback."""
    try:
        yield from payloads
    except UserError as error:
        yield {"user_error": str(error)}


# ----------------------------------------------------------------------------------------------------
# The workers' processes


def _stream(stages, workers):
    """An iterator over what the pipeline yields. Workers start now; they end when the iterator is closed."""
    loader = DataLoader(
        DataPipeline(*stages, _errors_as_data),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=functools.partial(_start_worker, dict(os.environ)),
        timeout=exchange_timeout().total_seconds() + LAST_WORD_SECONDS if workers else 0,
        pin_memory=torch.cuda.is_initialized(),  # pages locked for copies to the GPU that the trainer uses
        generator=torch.Generator(),  # else it would draw from the global one, whose state is the trainer's
    )
    if workers:
        start_fork_server()
        with shielded(), _main_module_hidden():
            return _unwrap(iter(loader))
    return _unwrap(iter(loader))


def _as_is(payload):
    return payload  # torch would turn the arrays into tensors


def _start_worker(environment, worker_id):
    """In a new worker: the trainer's environment of now (keys of a store, ...), not that of the server's start."""
    os.environ.clear()
    os.environ.update(environment)
    end_with_trainer(worker_id)


def _unwrap(payloads):
    deadline = _Deadline(getattr(payloads, "_workers", ()))
    try:
        while True:
            with deadline:
                payload = next(payloads, None)
            if payload is None:
                return
            if "user_error" in payload:
                raise UserError(payload["user_error"])
            yield payload
    except (RuntimeError, ConnectionError, EOFError) as error:
        if deadline.passed:
            deadline.abandon()
            raise UserError(
                f"no batch came for {exchange_timeout().total_seconds():,.0f} seconds: the storage of the shards does "
                "not answer; once it does, the same command goes on from the last checkpoint"
            ) from None
        # torch tells of a dead worker by a RuntimeError, and the batch it was sending by the errors of its socket.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a data worker died ({one_line(error)}): the machine may be short of memory or /dev/shm, "
            "lower data.workers"
        ) from None
    finally:
        del payloads  # ends the workers now: the traceback of an error would keep it, and them, alive


class _Deadline:
    """Ends workers that let the trainer wait for a batch for longer than ``collectives.exchange_timeout()``.

    By SIGKILL: a worker may hang as a whole, and then the trainer waits for it in a place that has no time limit of its
    own (the shared memory that a finished batch comes in). One that the kernel keeps, as while a disk is silent,
    hears nothing of it; then the DataLoader's own limit ends the wait, a little later.
    """

    def __init__(self, workers):
        self.workers, self.passed = workers, False

    def __enter__(self):
        self._timer = threading.Timer(exchange_timeout().total_seconds(), self._end)
        self._timer.daemon = True
        if self.workers:
            self._timer.start()

    def __exit__(self, *exception):
        self._timer.cancel()

    def _end(self):
        self.passed = True
        for worker in self.workers:
            worker.kill()

    def abandon(self):
        """This process's end is not to wait for workers that the kernel keeps."""
        for worker in self.workers:
            worker.join(LAST_WORD_SECONDS)
            if worker.is_alive():
                multiprocessing.process._children.discard(worker)


def start_fork_server():
    """Start the process that workers are forked from, if it does not run. Returns while it still imports.

    Worth calling early: its imports then overlap with building the model. It starts with the group's signals
    blocked, and so do the workers: torch's workers take a dead server for a dead trainer.
    """
    multiprocessing.set_forkserver_preload([__name__])
    with shielded(), _main_module_hidden():
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _main_module_hidden():
    """Keep new workers from importing the trainer's main module, as multiprocessing would have each do.

    It costs seconds and hundreds of megabytes a worker (DeepSpeed is behind it), and nothing of it is used
    there.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        if "__file__" in hidden:
            del main.__file__
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
