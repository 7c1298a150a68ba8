"""Batches of uint8 crops and their random parameters, prepared by worker processes in the order of the run.

The order of a run decides what is in a batch, a pipeline prepares it, workers run the pipeline, and they are taken in
turn. So a run's batches are the same with any number of workers, also none, and the global batches the same at any
number of ranks.

Shapes: B this rank's batch, h = w a view's crop side.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from caco_scale.data.in_memory import DecodedImages
from caco_scale.data.order import Order, rank_share
from caco_scale.data.pipeline import (
    EvaluationJob,
    TrainingJob,
    Undecodable,
    decoded_samples,
    errors_as_data,
    evaluation_reader,
    planned_samples,
    training_batches,
)
from caco_scale.data.pixels import Pixels
from caco_scale.data.store.base import Store
from caco_scale.data.views import ViewSpec
from caco_scale.data.workers import stream


@dataclass
class Batch:
    """This rank's share of one global batch.

    keys: planned samples as "shard/key", in batch order. crops: one (B, h, w, C) uint8 or uint16 per view. params: one
    dict per view of tensors with first axis B, for ``augment``. Both come on the CPU; ``to_device.on_device`` moves
    them. corrupt: samples that did not decode, as {"key", "error", "substitute"}; their rows hold the substitute's
    pixels under the planned sample's random numbers.
    """

    step: int
    epoch: int
    keys: list[str]
    crops: list[torch.Tensor]
    params: list[dict[str, torch.Tensor]]
    corrupt: list[dict]


def train_batches(
    store: Store,
    order: Order,
    views: Sequence[ViewSpec],
    *,
    rank: int,
    world_size: int,
    start_step: int,
    num_steps: int,
    seed: int,
    workers: int,
    stop: Callable[[], object] = bool,
    images: DecodedImages | None = None,
) -> Generator[Batch, None, None]:
    """This rank's training batches of steps ``start_step`` to ``num_steps`` - 1, counted over the whole run.

    store: where shards are; order: :class:`Order` of its samples; views: list of ViewSpec, one crop tensor
    for each. Nothing crosses ranks. With ``workers`` 0 everything runs in this process, else they start at
    the call, not at the first batch. ``stop``: of :func:`~caco_scale.data.workers.stream`. Returns an iterator of
    :class:`Batch`; closing it ends the workers. ``images``: where decoded images are kept, or those of an earlier
    call; None: nowhere. The batches are the same.

    A sample that does not decode is replaced by a random one that depends only on (seed, epoch, sample).
    Raises UserError at the call when the ranks do not divide the global batch, and while iterating when a
    shard is not as its manifest says, a worker dies, or none gives a batch for ``collectives.exchange_timeout()``.
    """
    rank_share(order.batch(start_step), rank, world_size)  # not divisible: an error now and in this process
    steps = range(start_step, num_steps)
    prefetch = cache_is_large_enough(store, order, start_step)
    job = TrainingJob(store, order, tuple(views), rank, world_size, steps, seed, prefetch, images)
    stages = [functools.partial(stage, job) for stage in (planned_samples, decoded_samples, training_batches)]
    sizes = [view.size for view in views]
    num_bytes = batch_bytes(order.global_batch_size // world_size, sizes, store.pixels)
    return _training_stream(stream([*stages, errors_as_data], workers, num_bytes, stop), start_step, store)


def batch_bytes(batch_size: int, sizes: Sequence[int], pixels: Pixels) -> int:
    """Bytes of the crops of so many images; ``sizes``: of a side, in pixels, of every view."""
    return batch_size * sum(pixels.num_bytes * size * size for size in sizes)


def cache_is_large_enough(store: Store, order: Order, step: int) -> bool:
    """Does the store's cache hold all shards that are in use at once? Else whole shards are not worth fetching.

    They would be evicted before they were read again. A lane reads from one window at a time.
    """
    position = step % order.steps_per_epoch
    steps = -(-order.window * order.lanes // order.global_batch_size)
    steps = min(steps, order.steps_per_epoch - position)
    ids = np.concatenate([order.batch(later) for later in range(step, step + steps)])
    return store.can_prefetch(np.unique(order.locate(ids)[0]).tolist())


def evaluation_batches(
    store: Store,
    size: int,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    workers: int,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
    resize: int = 0,
    undecodable: list[Undecodable] | None = None,
) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor], None, None]:
    """This rank's part of a shard set for evaluation: every sample exactly once over the ranks, centre-cropped.

    ids: ascending numbers of the samples to read, (n,); None: all of the set. size, resize: of :func:`centre_crop`.

    Returns an iterator of (indices (b,) int64 in the set, crops (b, size, size, C), labels (b,) int64,
    -1 where there is none), in index order; ranks take contiguous parts that differ by at most one sample. A
    sample that does not decode is left out and added to ``undecodable`` before its batch comes; where that is None, a
    warning names it. Raises as :func:`train_batches`.
    """
    numbers = range(store.manifest.num_samples) if ids is None else ids
    start, stop = (len(numbers) * r // world_size for r in (rank, rank + 1))
    batches = tuple(numbers[b : min(b + batch_size, stop)] for b in range(start, stop, batch_size))
    reader = functools.partial(evaluation_reader, EvaluationJob(store, size, resize, batches))
    num_bytes = batch_bytes(batch_size, [size], store.pixels)
    return _evaluation_stream(stream([reader, errors_as_data], workers, num_bytes), store, undecodable)


def _training_stream(payloads, start_step, store):
    with contextlib.closing(payloads):
        for step, payload in enumerate(payloads, start_step):
            assert payload["step"] == step, "the workers' batches are out of order"
            store.counters.merge(payload.pop("counters"))
            params = [{k: torch.from_numpy(v) for k, v in p.items()} for p in payload.pop("params")]
            crops = [torch.as_tensor(c) for c in payload.pop("crops")]
            yield Batch(params=params, crops=crops, **payload)


def _evaluation_stream(payloads, store, undecodable):
    with contextlib.closing(payloads):
        for payload in payloads:
            store.counters.merge(payload["counters"])
            if undecodable is not None:
                undecodable += payload["corrupt"]
            for image in payload["corrupt"] if undecodable is None else ():
                warnings.warn(f"left out of the evaluation: {image.name}: {image.error}", stacklevel=3)
            indices, crops, labels = (torch.as_tensor(payload[k]) for k in ("indices", "crops", "labels"))
            yield indices, crops, labels
