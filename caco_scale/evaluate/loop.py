"""The one training loop of the evaluations, which goes on where a killed one stopped, and the images it trains on.

Shapes: N global batch, B this rank's share, s pixels on a side.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from caco_scale.data.augment import normalise
from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order, rank_share
from caco_scale.data.store.base import Store
from caco_scale.data.views import ViewSpec
from caco_scale.distributed.collectives import assert_equal_on_all_ranks, gather_objects
from caco_scale.errors import UserError
from caco_scale.evaluate.results import ResultFolder
from caco_scale.evaluate.task import Task
from caco_scale.optim.schedule import cosine_decay
from caco_scale.run.signals import Signals

STATE = "state.pt"
SAVE_EVERY_STEPS = 100
CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop as it comes
NO_LABEL = -1  # of an image that did not decode, in whose place another one stands


@dataclass
class Progress:
    """How far a training is: finished steps, a record per epoch, the mean loss of the present one in the making.

    ``undecodable``: name and error of the images met that do not decode.
    """

    step: int = 0
    history: list[dict] = field(default_factory=list)
    loss_sum: float = 0.0
    undecodable: dict[str, str] = field(default_factory=dict)


class Learner(Protocol):
    """What :func:`fit` trains."""

    def update(self, batch: Any, factor: float) -> float:
        """One step at ``factor`` of the peak learning rate -> the loss before it, the same on every rank."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All its state by name; loading into them is restoring it."""
        ...


def fit(
    learner: Learner,
    batches: Callable[[int], Iterable[Any]],
    progress: Progress,
    *,
    num_steps: int,
    steps_per_epoch: int,
    folder: ResultFolder,
    end_epoch: Callable[[int], dict],
    undecodable: Mapping[str, str],
) -> None:
    """Train from ``progress.step`` to ``num_steps`` with a cosine to 0, saving every 100 steps and at an epoch's end.

    A stop signal on any rank ends the step, saves, and ends the process well, as it does in pre-training. Crosses
    ranks, beside what ``update`` does: the name of a signal, at every step, and the undecodable images, at a save.

    Args:
        batches: function of the first step -> iterator of what ``update`` takes.
        end_epoch: function of the epoch (1, 2, ...) -> a record for ``progress.history``; it gets ``loss`` added.
        undecodable: name and error of those that ``batches`` has met on this rank, growing.
    Raises:
        UserError: a loss that is not finite, with the step.
    """
    stop, saved = None, progress.step

    def answer(name, again):
        lost = f"the steps since step {saved:,}"
        if folder.is_main and again:
            os.write(2, f"\nstopped at once by a second Ctrl-C: {lost} are lost\n".encode())
        elif folder.is_main:
            print(f"{name}: stopping after this step, then saving; a second Ctrl-C loses {lost}", flush=True)

    with Signals() as signals, signals.telling(answer):
        for step, batch in enumerate(batches(progress.step), progress.step):
            loss = learner.update(batch, cosine_decay(step, num_steps))
            if not np.isfinite(loss):
                raise UserError(
                    f"step {step + 1} of {num_steps}: the loss is not finite: give a lower --lr, or --precision fp32"
                )
            progress.step, progress.loss_sum = step + 1, progress.loss_sum + loss
            ends = progress.step % steps_per_epoch == 0
            if ends:
                mean = progress.loss_sum / steps_per_epoch
                progress.history.append({**end_epoch(progress.step // steps_per_epoch), "loss": mean})
                progress.loss_sum = 0.0
            stop = next(filter(None, gather_objects(signals.requested)), None)
            if stop or ends or progress.step % SAVE_EVERY_STEPS == 0:
                for found in gather_objects(dict(undecodable)):
                    progress.undecodable |= found
                save(folder, learner, progress)
                saved = progress.step
            if stop:
                break
    if stop:  # ends as pre-training does
        signals.retire()
        if folder.is_main:
            done = f"after step {progress.step:,} of {num_steps:,}"
            print(
                f"stopped by {stop} {done}: the same command goes on from there ({folder.path})", flush=True
            )
        raise SystemExit(0)


def save(folder: ResultFolder, learner: Learner, progress: Progress) -> None:
    """Learner and progress, complete or not at all; the main rank's are everybody's."""
    if folder.is_main:
        stream = io.BytesIO()
        torch.save({"tensors": learner.tensors(), "progress": vars(progress)}, stream)
        folder.write_bytes(STATE, stream.getvalue())


def restore(folder: ResultFolder, learner: Learner) -> Progress:
    """The :class:`Progress` that a former start has left, its state put into ``learner``; else none. Collective."""
    progress, complaint = Progress(), None
    path = folder.path / STATE
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            for name, tensor in learner.tensors().items():
                tensor.copy_(content["tensors"][name])
            progress = Progress(**content["progress"])
        except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            complaint = f"{path} cannot be read ({type(error).__name__}): remove it to begin anew, or give another --to"
    assert_equal_on_all_ranks({"step": progress.step}, "resume", error=complaint)
    return progress


def check_batch(batch_size: int, num_images: int, world_size: int, why: str = "") -> None:
    """Refuse a global batch that the images or the processes do not allow."""
    if batch_size > num_images:
        raise UserError(
            f"--batch_size {batch_size:,} is more than the {num_images:,} training images{why}: "
            f"give {num_images:,} or less"
        )
    if batch_size % world_size:
        lower = batch_size // world_size * world_size
        raise UserError(
            f"--batch_size {batch_size} cannot be divided by {world_size} processes: give {lower or world_size} or "
            f"{lower + world_size}, or another number of processes"
        )


class LabelledBatch(NamedTuple):
    """Images (B, 3, s, s) and labels (B,) on the device, their numbers (B,) and those of the global batch (N,)."""

    images: Tensor
    labels: Tensor
    ids: np.ndarray
    global_ids: np.ndarray


class LabelledImages:
    """Random resized crops and flips of a store's images with their labels, the same at any number of processes.

    ``order``: whose ``steps_per_epoch`` counts; ``labels`` (n,): by sample number; ``undecodable``: name and error of
    the images met so far that do not decode.
    """

    def __init__(self, task: Task, store: Store, labels: np.ndarray, batch_size: int):
        self.task, self.store, self.labels = task, store, labels
        counts = store.manifest.shards.counts
        self.order = Order(counts, seed=task.seed, global_batch_size=batch_size)
        self.undecodable: dict[str, str] = {}

    def batches(self, start: int, end: int) -> Iterator[LabelledBatch]:
        """This rank's :class:`LabelledBatch` of every step from ``start`` up to ``end``."""
        task = self.task
        view = ViewSpec(size=task.size, scale=CROP_SCALE, jitter_p=0, grayscale_p=0, blur_p=0, solarize_p=0)
        stream = train_batches(
            self.store,
            self.order,
            [view],
            rank=task.rank,
            world_size=task.world_size,
            start_step=start,
            num_steps=end,
            seed=task.seed,
            workers=task.workers,
        )
        for batch in stream:
            global_ids = self.order.batch(batch.step)
            ids = rank_share(global_ids, task.rank, task.world_size)
            crops = batch.crops[0].to(task.device, non_blocking=True)
            images = normalise(crops, task.mean, task.std, task.dtype, task.device.type == "cuda")
            flip = batch.params[0]["flip"].to(task.device).view(-1, 1, 1, 1)
            images = torch.where(flip, images.flip(3), images)
            yield LabelledBatch(images, self._labels(batch, ids).to(task.device), ids, global_ids)

    def _labels(self, batch, ids):
        labels = torch.from_numpy(self.labels[ids])
        for entry in batch.corrupt:
            if entry["key"] not in self.undecodable:
                print(f"warning: {entry['key']} does not decode ({entry['error']}): left out", flush=True)
            self.undecodable[entry["key"]] = entry["error"]
            labels[batch.keys.index(entry["key"])] = NO_LABEL
        return labels
