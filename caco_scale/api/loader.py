"""The loader in one call: this rank's augmented views, in an order that depends on the seed alone.

Shapes: N global batch, B = N / world size, V views, H the side of a view in pixels.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from caco_scale import config as configuration
from caco_scale.config import Config, Views
from caco_scale.config.fields import Data, Run
from caco_scale.data.augment import augment
from caco_scale.data.augment_cpu import absent
from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order, share_size
from caco_scale.data.store import Store
from caco_scale.data.to_device import on_device
from caco_scale.distributed import collectives
from caco_scale.errors import UserError
from caco_scale.training.assemble import MicroBatches, open_training, training_order, view_specs


@dataclass
class ViewBatch:
    """This rank's share of one global batch.

    ``step``: its place in the order, from 0. ``epoch``: ``step // steps_per_epoch``. ``keys``: the B samples as
    ``shard/key``. ``views``: V tensors (B, C, H, H), augmented and normalised, on the device; row i of each is of
    sample i.
    """

    step: int
    epoch: int
    keys: list[str]
    views: list[torch.Tensor]


class Batches:
    """What :func:`batches` gives: ``for batch in it`` yields a :class:`ViewBatch` a step, from the first one each time.

    ``num_samples``: images of the set. ``steps_per_epoch``: whole global batches in it; what is left over of
    an epoch is dropped, another part in each. ``batch_size``: B. ``len()``: steps from ``start_step`` to the end.
    """

    num_samples: int
    steps_per_epoch: int
    batch_size: int

    def __init__(
        self,
        store: Store,
        order: Order,
        views: Views,
        *,
        steps: range,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
    ):
        self._store, self._order, self._views, self._steps = store, order, views, steps
        self._rank, self._world_size, self._seed, self._workers = rank, world_size, seed, workers
        self._device, self._dtype = device, dtype
        self.num_samples, self.steps_per_epoch = order.num_samples, order.steps_per_epoch
        self.batch_size = share_size(order.global_batch_size, world_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[ViewBatch]:
        if not self._steps:
            return
        crops = train_batches(
            self._store,
            self._order,
            view_specs(self._views, self._store.pixels.channels),
            start_step=self._steps.start,
            num_steps=self._steps.stop,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            workers=self._workers,
        )
        for batch in on_device(crops, self._device):
            (views,) = MicroBatches(batch, self.batch_size, augment, self._dtype, self._views)
            yield ViewBatch(batch.step, batch.epoch, batch.keys, views)


def batches(
    data: str | os.PathLike[str] | Mapping[str, float],
    *,
    global_batch_size: int,
    views: Views | None = None,
    epochs: int = 1,
    start_step: int = 0,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    lanes: int = 0,
    window: int = 4096,
    cache_dir: str = "auto",
    cache_bytes: int = 0,
    channels: int = 3,
    bits: int = 8,
) -> Batches:
    """Augmented views of a set of images for a training loop of one's own, the very ones that ``pretrain`` trains on.

    The order and every random number follow from (seed, epoch, sample): the global batch of a step is the same at any
    number of processes and workers, each sample comes at most once an epoch, and ``start_step`` resumes in the middle
    of one at no cost. Nothing crosses ranks. An image that does not decode is replaced by another one.

    Args:
        data: images as ``data.shards`` has them: a folder, a list, parquet files, or the directory or address of a
            shard set; or several of them with their weights, {place: weight}, as ``data.mix``.
        global_batch_size: N, images of a step over all processes, which their number must divide.
        views: sizes and strengths of the two global views and the local crops, mean and standard deviation;
            None: those of the paper at 224 pixels.
        epochs: the last step is this many epochs from the first of all.
        start_step: the first step to give, counted over all epochs.
        rank, world_size: this process among those that share the batch; None: torch.distributed's.
        device: where the crops are augmented and the views end.
        workers: processes that decode; 0: this one does.
        lanes, window, cache_dir, cache_bytes, channels, bits: as ``data.*`` of the configuration; of other than three
            channels the mean and standard deviation that ``views`` leaves out are 0.5.

    Raises:
        UserError: no such set, a batch that does not divide; while iterating: damaged data, a worker that died.
    """
    rank, world_size = _place(rank, world_size)
    places: dict[str, Any]
    if isinstance(data, Mapping):
        places = {"mix": tuple(f"{place}={weight}" for place, weight in data.items())}
    else:
        places = {"shards": os.fspath(data)}
    images = Data(
        **places,
        channels=channels,
        bits=bits,
        global_batch_size=global_batch_size,
        lanes=lanes,
        window=window,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    config = Config(run=Run(seed=seed), data=images, views=views or Views())
    config = configuration.settle_channels(config, Config())
    views = config.views
    if views.stats == "measure":
        raise UserError("views: stats measure is of a run: give mean and std")
    view_specs(views, channels)  # refuses now what it would refuse at the first batch
    configuration.check(config)
    store = open_training(config, flag="data")
    store.check()
    if store.unchecked:
        warnings.warn(store.unchecked, stacklevel=2)
    if torch.device(device).type == "cpu" and (slow := absent()):
        warnings.warn(slow, stacklevel=2)
    order = training_order(config, store)
    end = epochs * order.steps_per_epoch
    if not 0 <= start_step <= end:
        raise UserError(
            f"start_step {start_step} is not within the {end:,} steps of {epochs} epoch(s): give more epochs"
        )
    return Batches(
        store,
        order,
        views,
        steps=range(start_step, end),
        rank=rank,
        world_size=world_size,
        seed=seed,
        device=torch.device(device),
        dtype=dtype,
        workers=workers,
    )


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's place; a launch whose processes have not met would give all of them rank 0's images."""
    if (rank is None) != (world_size is None):
        raise UserError("give rank and world_size together, or neither")
    if rank is None or world_size is None:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        rank, world_size = collectives.rank(), collectives.world_size()
        if world_size == 1 and launched > 1:
            raise UserError(
                f"this is one of {launched} processes (WORLD_SIZE) that have not met: call "
                "torch.distributed.init_process_group before batches, or give rank and world_size"
            )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is none of 0 to {world_size - 1}")
    return rank, world_size
