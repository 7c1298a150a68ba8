"""The one training loop of the evaluations, which goes on where a killed one stopped, and the images it trains on.

Shapes: N global batch, B this rank's share, s pixels on a side.
"""

import io
import pickle
from dataclasses import dataclass, field

import numpy as np
import torch

from caco_scale.data.augment import normalise
from caco_scale.data.loader import train_batches
from caco_scale.data.order import Order, rank_share
from caco_scale.data.views import ViewSpec
from caco_scale.distributed.collectives import assert_equal_on_all_ranks
from caco_scale.errors import UserError
from caco_scale.optim.schedule import cosine_decay

STATE = "state.pt"
SAVE_EVERY_STEPS = 100
CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop as it comes
NO_LABEL = -1  # of an image that did not decode, in whose place another one stands


@dataclass
class Progress:
    """How far a training is: finished steps, a record per epoch, the mean loss of the present one in the making."""

    step: int = 0
    history: list = field(default_factory=list)
    loss_sum: float = 0.0


def fit(learner, batches, progress, *, num_steps, steps_per_epoch, folder, end_epoch):
    """Train from ``progress.step`` to ``num_steps`` with a cosine to 0, saving every 100 steps and at an epoch's end.

    Args:
        learner: has ``update(batch, factor) -> loss`` (a number, the same on every rank; ``factor``: of the peak
            learning rate) and ``tensors() -> {name: tensor}``, all its state.
        batches: function of the first step -> iterator of what ``update`` takes.
        end_epoch: function of the epoch (1, 2, ...) -> a record for ``progress.history``; it gets ``loss`` added.
    Raises:
        UserError: a loss that is not finite, with the step.
    """
    for step, batch in enumerate(batches(progress.step), progress.step):
        loss = learner.update(batch, cosine_decay(step, num_steps))
        if not np.isfinite(loss):
            raise UserError(
                f"step {step + 1} of {num_steps}: the loss is not finite: give a lower --lr, or --precision fp32"
            )
        progress.step, progress.loss_sum = step + 1, progress.loss_sum + loss
        if progress.step % steps_per_epoch == 0:
            mean = progress.loss_sum / steps_per_epoch
            progress.history.append({**end_epoch(progress.step // steps_per_epoch), "loss": mean})
            progress.loss_sum = 0.0
        if progress.step % steps_per_epoch == 0 or progress.step % SAVE_EVERY_STEPS == 0:
            save(folder, learner, progress)


def save(folder, learner, progress):
    """Learner and progress, complete or not at all; the main rank's are everybody's."""
    if folder.is_main:
        stream = io.BytesIO()
        torch.save({"tensors": learner.tensors(), "progress": vars(progress)}, stream)
        folder.write_bytes(STATE, stream.getvalue())


def restore(folder, learner):
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


def check_batch(batch_size, num_images, world_size, why=""):
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


class LabelledImages:
    """Random resized crops and flips of a store's images with their labels, the same at any number of processes.

    ``order``: whose ``steps_per_epoch`` counts; ``labels`` (n,): by sample number.
    """

    def __init__(self, setting, store, labels, batch_size):
        self.setting, self.store, self.labels = setting, store, labels
        counts = [shard.num_samples for shard in store.manifest.shards]
        self.order = Order(counts, seed=setting.seed, global_batch_size=batch_size)

    def batches(self, start, end):
        """This rank's (images (B, 3, s, s), labels (B,)) of every step from ``start`` up to ``end``, on its device."""
        setting = self.setting
        view = ViewSpec(
            size=setting.size, scale=CROP_SCALE, jitter_p=0, grayscale_p=0, blur_p=0, solarize_p=0
        )
        stream = train_batches(
            self.store,
            self.order,
            [view],
            rank=setting.rank,
            world_size=setting.world_size,
            start_step=start,
            num_steps=end,
            seed=setting.seed,
            workers=setting.workers,
        )
        for batch in stream:
            labels = self._labels(batch)
            crops = batch.crops[0].to(setting.device, non_blocking=True)
            images = normalise(crops, setting.mean, setting.std, setting.dtype, setting.device.type == "cuda")
            flip = batch.params[0]["flip"].to(setting.device).view(-1, 1, 1, 1)
            yield torch.where(flip, images.flip(3), images), labels.to(setting.device)

    def _labels(self, batch):
        ids = rank_share(self.order.batch(batch.step), self.setting.rank, self.setting.world_size)
        labels = torch.from_numpy(self.labels[ids])
        for entry in batch.corrupt:
            print(f"warning: {entry['key']} does not decode ({entry['error']}): left out", flush=True)
            labels[batch.keys.index(entry["key"])] = NO_LABEL
        return labels
